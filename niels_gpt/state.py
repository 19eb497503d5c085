"""Training state: what the next step needs, and nothing else."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.model.blocks import init_weights
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import BETAS, EPS
from niels_gpt.rng import keyed_generator


class TrainState(NamedTuple):
    """A point of the training trajectory: the step maps one to the next."""

    params: dict[str, Tensor]  # name -> float32 tensor; the tied weight once, as tok_emb.weight
    mu: dict[str, Tensor]  # AdamW first moment (torch: exp_avg), as params
    nu: dict[str, Tensor]  # AdamW second moment (torch: exp_avg_sq), as params
    step: int  # finished updates
    model_cfg: ModelConfig
    train_cfg: TrainConfig


def make_state(
    model_cfg: ModelConfig, train_cfg: TrainConfig, device: torch.device | str = "cpu"
) -> TrainState:
    """Initialise parameters from `train_cfg.seed`, moments zero, step 0.

    The weights are drawn on the CPU, so that every device starts from the same ones.
    """
    generator = keyed_generator(train_cfg.seed, "init", 0)
    model = empty_model(model_cfg).apply(partial(init_weights, generator=generator))
    params = {name: p.detach().to(device) for name, p in model.named_parameters()}
    return TrainState(params, _zeros(params), _zeros(params), 0, model_cfg, train_cfg)


def to_modules(state: TrainState) -> tuple[GPT, torch.optim.AdamW]:
    """Copy a state into a GPT and a torch.optim.AdamW that continue it imperatively.

    The learning rate of the optimizer is the config's base_lr: it is not part of the state.
    """
    device = state.params["tok_emb.weight"].device
    model = empty_model(state.model_cfg, device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=state.train_cfg.base_lr,
        betas=BETAS,
        eps=EPS,
        weight_decay=state.train_cfg.weight_decay,
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state.params[name])
            if state.step:
                optimizer.state[p] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": state.mu[name].clone(),
                    "exp_avg_sq": state.nu[name].clone(),
                }
    return model, optimizer


def from_modules(model: GPT, optimizer: torch.optim.AdamW, train_cfg: TrainConfig) -> TrainState:
    """Copy a GPT and its torch.optim.AdamW into a state. Inverse of `to_modules`.

    Raises:
        ValueError: if the parameters disagree on the number of finished updates.
    """
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    mu, nu, steps = _zeros(params), _zeros(params), set()
    for name, p in model.named_parameters():
        moments = optimizer.state.get(p)
        steps.add(int(moments["step"]) if moments else 0)
        if moments:
            mu[name] = moments["exp_avg"].detach().clone()
            nu[name] = moments["exp_avg_sq"].detach().clone()
    if len(steps) > 1:
        raise ValueError(f"parameters have seen different numbers of updates: {sorted(steps)}")
    return TrainState(params, mu, nu, steps.pop(), model.cfg, train_cfg)


def empty_model(cfg: ModelConfig, device: torch.device | str = "cpu") -> GPT:
    """Build a GPT whose parameters have storage but no values, without drawing any."""
    with torch.device("meta"):
        model = GPT(cfg)
    model.to_empty(device=device)
    model.lm_head.weight = model.tok_emb.weight  # to_empty unties them
    return model


def _zeros(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in params.items()}

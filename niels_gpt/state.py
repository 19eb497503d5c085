"""The training state: exactly what the next step needs."""

from functools import partial
from typing import NamedTuple

import torch

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.model.gpt import GPT, INITS, without_storage
from niels_gpt.optim import OptState, from_entries, optimizer_of, to_entries
from niels_gpt.optim.trees import Tree, map_tensors
from niels_gpt.rng import keyed_generator


class TrainState(NamedTuple):
    """A point of the training trajectory; a step maps it to the next."""

    params: Tree  # name -> float32 tensor; the tied weight once, as tok_emb.weight
    opt_state: OptState  # a NamedTuple of trees that only the optimizer reads
    step: int  # finished updates
    model_cfg: ModelConfig
    train_cfg: TrainConfig

    @property
    def device(self) -> torch.device:
        """Return the device of the tensors."""
        return self.params["tok_emb.weight"].device

    def trees(self) -> dict[str, Tree]:
        """Return all trees by name: "params" and the optimizer's."""
        return {"params": self.params, **self.opt_state._asdict()}


def make_state(
    model_cfg: ModelConfig, train_cfg: TrainConfig, device: torch.device | str = "cpu"
) -> TrainState:
    """Initialise the parameters from `train_cfg.seed` and the optimizer's state; step 0.

    Weights are drawn on the CPU, so every device starts from the same ones.
    """
    generator = keyed_generator(train_cfg.seed, "init", 0)
    model = empty_model(model_cfg).apply(partial(INITS[train_cfg.init], generator=generator))
    params = {name: p.detach().to(device) for name, p in model.named_parameters()}
    return TrainState(params, optimizer_of(train_cfg).init(params), 0, model_cfg, train_cfg)


def to_modules(state: TrainState) -> tuple[GPT, torch.optim.Optimizer]:
    """Copy a state into a GPT and a torch.optim optimizer, to continue it imperatively.

    The learning rate, which is not part of the state, is set to the config's base_lr.
    """
    model = empty_model(state.model_cfg, state.device)
    params, cfg = dict(model.named_parameters()), state.train_cfg
    optimizer = optimizer_of(cfg).torch_optim(params, lr=cfg.base_lr, weight_decay=cfg.weight_decay)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(state.params[name])
    own = map_tensors(torch.clone, state.opt_state)
    optimizer.state.update(
        {params[name]: entry for name, entry in to_entries(own, params, state.step).items()}
    )
    return model, optimizer


def from_modules(
    model: GPT, optimizer: torch.optim.Optimizer, train_cfg: TrainConfig
) -> TrainState:
    """Copy a GPT and its torch.optim optimizer into a state. Inverse of `to_modules`.

    The optimizer counts its updates in float32, exactly up to 2^24. One that keeps no state, such
    as SGD without momentum, gives step 0.

    Raises:
        ValueError: if the parameters disagree on the number of finished updates, or what the
            optimizer keeps is not what the config's does.
    """
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    entries = {name: optimizer.state.get(p) or {} for name, p in model.named_parameters()}
    steps = {int(entry.get("step", 0)) for entry in entries.values()}
    if len(steps) > 1:
        raise ValueError(f"parameters have had different numbers of updates: {sorted(steps)}")
    step, opt_state = steps.pop(), optimizer_of(train_cfg).init(params)
    if step:
        opt_state = map_tensors(lambda t: t.detach().clone(), from_entries(entries, opt_state))
    return TrainState(params, opt_state, step, model.cfg, train_cfg)


def empty_model(cfg: ModelConfig, device: torch.device | str = "cpu") -> GPT:
    """Build a GPT with uninitialised parameters, without random draws."""
    model = without_storage(cfg)
    model.to_empty(device=device)
    model.lm_head.weight = model.tok_emb.weight  # to_empty unties them
    return model

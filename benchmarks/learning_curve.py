"""Validation loss of the plain loop on the trainer's own data and schedule, as JSON lines.

    python -m benchmarks.learning_curve --config configs/smoke.json --wiki DIR --roam DIR \
        --steps 400 --seed 42 --out curve.jsonl

Each line holds step, val_wiki_loss (nats; by the source that the config judges by), train_loss (of
that step's batch), lr and seconds. The learning rate follows the config's `total_steps` even when
the run stops earlier, so that curves compare step by step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.imperative import ImperativeGPT, cross_entropy, imperative_step, make_optimizer
from niels_gpt.batching import get_batch
from niels_gpt.config import ModelConfig, TrainConfig, load_config_from_json
from niels_gpt.corpus import Corpus, open_corpus
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.streams import StreamBuildConfig


def learning_curve(
    model_cfg: ModelConfig,
    cfg: TrainConfig,
    corpus: Corpus,
    *,
    steps: int,
) -> Iterator[dict[str, float]]:
    """Yield one record per evaluation: every `cfg.eval_every` updates and after the last."""
    torch.manual_seed(cfg.seed)
    model = ImperativeGPT(model_cfg)
    optimizer = make_optimizer(model, cfg)
    batches = torch.Generator().manual_seed(cfg.seed)
    started = time.perf_counter()
    for step in range(steps):
        lr = lr_of_step(step, cfg)
        x, y = get_batch(
            corpus.train, p=corpus.p, B=cfg.B, T=model_cfg.T, device="cpu", generator=batches
        )
        loss = imperative_step(model, optimizer, x, y, lr=lr, grad_clip=cfg.grad_clip)
        done = step + 1
        if done % cfg.eval_every == 0 or done == steps:
            yield {
                "step": done,
                f"val_{corpus.val_source}_loss": validation_loss(
                    model, corpus.validation, cfg, T=model_cfg.T
                ),
                "train_loss": loss.item(),
                "lr": lr,
                "seconds": round(time.perf_counter() - started, 1),
            }


@torch.no_grad()
def validation_loss(model: ImperativeGPT, stream: bytes, cfg: TrainConfig, *, T: int) -> float:
    """Mean nats over the `cfg.eval_steps` batches that `eval_loss_on_stream` draws."""
    generator = torch.Generator().manual_seed(cfg.seed)
    model.eval()
    losses: list[Tensor] = []
    for _ in range(cfg.eval_steps):
        x, y = get_batch(
            {"wiki": stream}, p={"wiki": 1.0}, B=cfg.B, T=T, device="cpu", generator=generator
        )
        losses.append(cross_entropy(model, x, y))
    model.train()
    return torch.stack(losses).mean().item()


@click.command()
@click.option("--config", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--wiki", type=click.Path(exists=True, file_okay=False), required=True)
@click.option("--roam", type=click.Path(exists=True, file_okay=False))
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True)
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
def main(
    config: Path, wiki: str, roam: str | None, steps: int, seed: int, out: Path, threads: int | None
) -> None:
    """Train the plain loop and write its validation curve."""
    if threads:
        torch.set_num_threads(threads)
    model_cfg, cfg = load_config_from_json(config)
    cfg = replace(cfg, seed=seed)
    folders = StreamBuildConfig(places={"wiki": wiki, **({"roam": roam} if roam else {})})
    curve = learning_curve(model_cfg, cfg, open_corpus(model_cfg, cfg, folders), steps=steps)
    with out.open("w", encoding="utf-8") as file:
        for record in curve:
            line = json.dumps(record)
            print(line, file=file, flush=True)
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Train on several processes or machines: the same step with different gradients.

    torchrun --nproc-per-node 2 examples/data_parallel.py --config quick --out checkpoints/two

Each rank computes the gradient of its rows of batch k; their mean is that of the whole batch, up
to rounding. The files are those of `niels-gpt train`: each can resume the other's checkpoints.
"""

import hashlib
import io
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor

from niels_gpt import ModelConfig
from niels_gpt.cli.shared.options import PATH, source_options
from niels_gpt.cli.shared.output import EnduringConsole, exit_on_failure
from niels_gpt.config import read_config
from niels_gpt.files import durable
from niels_gpt.loss import Batch, gradients
from niels_gpt.optim.trees import Tree, to_tree, to_vector
from niels_gpt.run import loop, progress, session
from niels_gpt.run.folder import Folder
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.plan import make_plan
from niels_gpt.run.stop import Stop
from niels_gpt.step import train_step


def parallel_gradients(
    params: Tree, batch: Batch, cfg: ModelConfig, drop: Tensor | None
) -> tuple[Tree, Tensor]:
    """Compute `gradients`, each rank processing its share of the rows."""
    rows = torch.arange(len(batch[0])).chunk(dist.get_world_size())[dist.get_rank()]
    own = batch[0][rows], batch[1][rows]
    grads, loss = gradients(params, own, cfg, None if drop is None else drop[rows])
    mean = to_vector({**grads, "loss": loss}) / dist.get_world_size()
    dist.all_reduce(mean)  # one exchange; every rank gets the same bits
    return to_tree(mean[:-1], grads), mean[-1]


@click.command()
@click.option("--config", required=True)
@click.option("--out", type=PATH, required=True)
@click.option("--resume")
@click.option("--set", "overrides", multiple=True)
@source_options
def main(**given: Any) -> None:
    """Train with the loop of niels_gpt and the gradients above."""
    options = TrainOptions(device="cpu", compile=False, **given)
    with exit_on_failure(2):
        document = read_config(given["config"])
        plan = make_plan(*document.configs(options.overrides), options, document=document)
    configs, console = plan.state[-2:], EnduringConsole()
    dist.init_process_group("gloo")
    same = hashlib.sha256(repr((configs, plan.corpus.record, plan.state.step)).encode()).digest()
    of_all = torch.tensor(list(same))
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    if bytes(of_all.tolist()) != same or configs[1].B % dist.get_world_size():
        raise click.ClickException("ranks need equal configs and text, and a number that divides B")
    durable.make_folder(plan.out)
    folder, step = Folder(plan, console), partial(train_step, gradients=parallel_gradients)
    ports = session.ports_of(
        plan, folder, progress.Reporter(plan, folder.metrics, console), Stop(), step
    )
    if dist.get_rank() == 0:
        progress.say_opening(plan, console)
    else:  # only the first rank prints and saves
        sys.stdout = io.StringIO()
        ports = replace(ports, save=lambda *_: True)
    with exit_on_failure(1):
        *_, saved = loop.run(plan.state, plan.scores, ports)
    dist.destroy_process_group()
    sys.exit(0 if saved else 1)


if __name__ == "__main__":
    main()

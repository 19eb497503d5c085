"""The `train` command, which pr-06 wants at `niels_gpt.train`."""

from niels_gpt.train import main as main

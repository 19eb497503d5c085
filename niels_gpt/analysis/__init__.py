"""Looking at text, checkpoints and runs: scores, pictures, replays, sweeps, gradients."""

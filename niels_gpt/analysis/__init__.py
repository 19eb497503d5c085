"""Analyses of text, checkpoints and runs: scores, pictures, replays, sweeps, gradients."""

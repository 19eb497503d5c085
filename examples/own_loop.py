"""Train with a loop of your own that saves, and continues from its file when it is run again.

Example: python examples/own_loop.py text.txt state.pt
"""

import sys
from pathlib import Path

from niels_gpt import (
    ModelConfig,
    TrainConfig,
    batch_of_step,
    evaluate,
    load_state,
    make_state,
    save_state,
    train_step,
)
from niels_gpt.lr_schedule import lr_of_step


def main(text: Path, file: Path, steps: int = 20) -> float:
    """Train for some more steps; return the loss on the last tenth of the text, in nats."""
    data = text.read_bytes()
    cut = len(data) * 9 // 10
    model_cfg = ModelConfig(T=64, C=64, L=2, H=2, d_ff=256, dropout=0.0)
    cfg = TrainConfig(B=8, total_steps=10_000, warmup_steps=10, base_lr=3e-3, eval_steps=8)

    state = load_state(file) if file.exists() else make_state(model_cfg, cfg)
    for k in range(state.step, state.step + steps):  # batch, dropout and rate depend on k alone
        batch = batch_of_step(cfg.seed, k, {"text": data[:cut]}, p={"text": 1.0}, B=8, T=64)
        state, _ = train_step(state, batch, lr_of_step(k, cfg))
    save_state(file, state)
    return evaluate(state, data[cut:], seed=0)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))

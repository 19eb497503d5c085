"""Load a `niels-gpt checkpoint export` with plain torch and safetensors, without niels_gpt.

Example: python examples/load_export.py model.safetensors "The river "
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rotate(x, turn):  # (H, T, D): neighbours are the parts of a complex number
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def logits(w, cfg, ids):  # ids (T,) int64 -> (T, V), of the byte after each
    T, H, D = len(ids), cfg["H"], cfg["C"] // cfg["H"]
    angle = torch.outer(torch.arange(T), cfg["rope_theta"] ** (-torch.arange(0, D, 2) / D))
    turn = torch.polar(torch.ones(()), angle)
    x = w["tok_emb.weight"][ids]
    for b in (f"blocks.{i}" for i in range(cfg["L"])):
        qkv = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.ln1", x)).view(T, 3, H, D)
        q, k, v = qkv.permute(1, 2, 0, 3).contiguous()
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        x = x + linear(w, f"{b}.attn.proj", y.transpose(0, 1).flatten(1))
        x = x + linear(w, f"{b}.mlp.fc2", F.gelu(linear(w, f"{b}.mlp.fc1", norm(w, f"{b}.ln2", x))))
    return norm(w, "ln_f", x) @ w["tok_emb.weight"].T


if __name__ == "__main__":
    w, cfg = load_file(sys.argv[1]), json.load(Path(sys.argv[1]).with_suffix(".json").open())
    print(logits(w, cfg["model"], torch.tensor([*sys.argv[2].encode()]))[-1].topk(5))

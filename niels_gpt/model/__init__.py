"""The model: a byte-level GPT with rotary positions and tied embeddings."""

from niels_gpt.model.blocks import CausalSelfAttention
from niels_gpt.model.gpt import GPT
from niels_gpt.model.rope import apply_rope, rope_cache

__all__ = ["GPT", "CausalSelfAttention", "apply_rope", "rope_cache"]

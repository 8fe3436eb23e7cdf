"""The seam for simulated attention in transformers: an attention function and its mask function.

Both are registered under one name: transformers hands no mask to an attention whose name has no
mask function, and the model would not be causal.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "aixsim"


def simulated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by the module's `inner_attention`; digital where a module has none.

    Args:
        module: the attention module of a transformers model.
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, D).
        attention_mask: None or bool (B, 1, Lq, Lk), True = attend.
        dropout: of the probabilities; simulated attention has none.
        scaling: of the scores.
        is_causal: None = what the module says.

    Returns:
        (B, Lq, H, D) and None.
    """
    inner = getattr(module, "inner_attention", None)
    if inner is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # the mask function leaves the mask out only where causality says it all, or for one query
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    output = inner(query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=is_causal)
    return torch.transpose(output, 1, 2).contiguous(), None


def register() -> None:
    """Make the name known to transformers; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, simulated_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)

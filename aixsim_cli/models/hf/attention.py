"""The seam for simulated attention in transformers: its `sdpa`, with the two products simulated.

Model code branches on the *name* of the attention implementation: whether it builds a mask of
chosen keys, may leave one out, or may cut queries off. Under a name of its own a model would be
another one, with nothing simulated at all. So the function known as `sdpa` is wrapped: a module
with an `inner_attention` is simulated as sdpa would compute it, every other one stays digital.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aixsim_cli.errors import ConfigError

ATTENTION_NAME = "sdpa"
# the mask says it already, it is about what is returned, or only other implementations need it
HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        # generate() hands its own on: they stop it at a text
        "tokenizer",
        "assistant_tokenizer",
        "use_cache",
    }
)
HONOURED = frozenset(
    {
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "dropout",
        "scaling",
        "is_causal",
        "position_bias",
    }
)
# under sdpa's name the model puts them into the mask, and hands over None
MASKED_BY_MODEL = frozenset({"indices", "block_indices"})


def register() -> None:
    """Wrap the attention that transformers knows as sdpa; idempotent."""
    digital = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
    if not getattr(digital, "simulates", False):
        AttentionInterface.register(ATTENTION_NAME, _simulating(digital))


def simulated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by the module's `inner_attention`, masked as transformers' sdpa masks it.

    Args:
        module: the attention module of a transformers model.
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        attention_mask: None, bool (True = attend) or additive; broadcastable to (B, H, Lq, Lk).
        dropout: of the probabilities; simulated attention has none.
        scaling: of the scores.
        is_causal: None = what the module says. Holds where there is no mask, for more than one
            query: query i then sees the keys up to i, as sdpa counts ("upper left").
        position_bias: added to the scaled scores, broadcastable to (B, H, Lq, Lk); gets a gradient.
        others: what other implementations may need.

    Returns:
        (B, Lq, H, Dv) and None.

    Raises:
        ConfigError: a keyword or a mask that the simulation would have to ignore.
    """
    _refuse_unknown(module, attention_mask, others)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    queries, keys = query.shape[2], key.shape[2]
    is_causal = bool(is_causal) and attention_mask is None and queries > 1
    if is_causal and keys > queries:
        # a static cache: its slots behind the prompt are empty
        key, value = key[:, :, :queries], value[:, :, :queries]
        if position_bias is not None:
            position_bias = position_bias[..., :queries]
    elif is_causal and keys < queries:
        # simulated attention counts from the last key, sdpa from the first
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        attention_mask, is_causal = seen[None, None], False
    if position_bias is not None:
        attention_mask = create_position_bias_mask(
            position_bias, attention_mask, is_causal, query, key
        )
        is_causal = False
    inner: Any = module.inner_attention
    output = inner(query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=is_causal)
    return torch.transpose(output, 1, 2).contiguous(), None


def _simulating(digital: Callable[..., Any]) -> Callable[..., Any]:
    def attention(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        simulated = getattr(module, "inner_attention", None) is not None
        function = simulated_attention_forward if simulated else digital
        return function(module, *arguments, **keywords)

    attention.simulates = True  # pyright: ignore[reportFunctionMemberAccess]
    return attention


def _refuse_unknown(module: nn.Module, mask: Any, others: dict[str, Any]) -> None:
    problems = [
        f"{name}: simulated attention does not know this keyword of transformers' attention "
        "interface; expected None, or no rule for this attention"
        for name, value in others.items()
        if name not in HARMLESS and value is not None and value is not False
    ]
    if mask is not None and not _is_mask(mask):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        problems.append(f"attention_mask: got {kind}; expected a bool or float tensor")
    packed = others.get("cu_seq_lens_q")
    if mask is None and packed is not None and len(packed) > 2:
        problems.append(
            f"cu_seq_lens_q: got {len(packed) - 1} sequences in a row and no mask that keeps them "
            "apart; expected position_ids that start anew with each of them"
        )
    if problems:
        where = f"{type(module).__name__} of {type(module).__module__}"
        raise ConfigError([f"{where}: {problem}" for problem in problems])


def _is_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())

"""A Llama's modules by two names: torchtitan's and Hugging Face's.

The table is written down because neither `hf/` nor `titan/` may import the other's library; a test
compares it with torchtitan's own adapter.
"""

import re

# torchtitan's -> Hugging Face's; {} is the layer
PAIRS = {
    "tok_embeddings": "model.embed_tokens",
    "layers.{}.attention": "model.layers.{}.self_attn",
    "layers.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}


def hf_name(titan: str) -> str:
    """`layers.0.attention.wq[.…]` -> `model.layers.0.self_attn.q_proj[.…]`.

    Raises:
        KeyError: no module of the model has that name.
    """
    return _rename(titan, PAIRS)


def titan_name(hf: str) -> str:
    """The inverse of `hf_name`."""
    return _rename(hf, {there: here for here, there in PAIRS.items()})


def _rename(name: str, pairs: dict[str, str]) -> str:
    layer = re.search(r"\d+", name)
    index = layer.group() if layer else ""
    # the longest prefix wins: an attention's linear before the attention itself
    for old in sorted(pairs, key=len, reverse=True):
        prefix = old.format(index)
        if name == prefix or name.startswith(f"{prefix}."):
            return pairs[old].format(index) + name[len(prefix) :]
    raise KeyError(name)

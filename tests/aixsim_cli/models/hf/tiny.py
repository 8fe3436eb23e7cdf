"""A small model of any text model type of the installed transformers, and something to feed it."""

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
    "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
}
VOCAB, WIDTH, HEADS, LENGTH, PADDED = 128, 64, 4, 20, 5
# whole names of settings -> their value in a small model; the first that matches holds
SIZES: list[tuple[str, Any]] = [
    (r".*drop.*", 0.0),
    (r"(\w+_)?vocab_size(_\w+)?", VOCAB),
    (r"(\w+_)?(num_key_value_heads|num_kv_heads)|linear_num_key_heads|num_query_groups", 2),
    (r"linear_num_value_heads|\w*attention_heads|n_heads?|num_heads|heads|index_n_heads", HEADS),
    (r"mamba_(n|num)_heads", 8),
    (r"qk_rope_head_dim", 8),
    (r"\w*head_dim|d_kv|(\w+_)?d_head|attention_head_size|kv_channels", WIDTH // HEADS),
    (r"\w*_rank", 16),
    (r"\w*intermediate_size\w*|\w*ffn_(dim|size|hidden_size)|d_ff|n_inner|\w*mlp_dim", WIDTH),
    (
        r"dim_ff|inner_dim|(\w+_)?d_model|d_embed|n_embd|(embed_|emb_|model_|hidden_)?dim",
        WIDTH,
    ),
    (
        r"(attention_|rnn_|backbone_)?hidden_size|embedding_size|word_embed_proj_dim|lru_width",
        WIDTH,
    ),
    (r"projection_dim", WIDTH),
    (r"n_layers?|num_layers|\w+_layers", 2),
    (r"num_(local_|moe_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts|num_selected_experts", 2),
    (r"n_group|topk_group|n_groups|mamba_n_groups", 1),
    (r"sliding_window|attention_chunk_size|local_attention|attention_window|window_size", 8),
    (r"index_topk", 4),
    (r"num_filters", 2),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
]
# what the names of the settings do not tell: a layer of each kind, dimensions that must agree
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "text_config": {"num_key_value_heads": HEADS},
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 3, "pad_token_id": 0},
    "esmc": {"vocab_size": VOCAB, "num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": WIDTH},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "musicflamingo": {"audio_config": {"model_type": "audioflamingo3_encoder"}},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": WIDTH}},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {
        "num_latents": 16, "d_latents": WIDTH, "num_self_attends_per_block": 2,
        "num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 1000,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (4, 5)},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
}  # fmt: skip
OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def entries() -> list[tuple[str, str]]:
    """Every (model type, kind) of the installed transformers."""
    return [(name, kind) for kind, (names, _) in KINDS.items() for name in sorted(names)]


def small_settings(default: Any) -> dict[str, Any]:
    """Settings that differ from a config's own, by their names."""
    values = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in getattr(default, "sub_configs", {}):
            if value is not None:
                found[key] = small_settings(value)
        elif key.endswith("_token_id"):
            found[key] = _token(key, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            size = next((s for pattern, s in SIZES if re.fullmatch(pattern, key)), None)
            if size is not None and value:
                found[key] = type(value)(min(value, size))
    if values.get("qk_rope_head_dim") and values.get("qk_nope_head_dim"):
        # keys of two parts, and a head_dim that speaks of the rotated one
        agreed = {"head_dim": 8, "qk_head_dim": 24, "num_key_value_heads": HEADS}
        found |= {k: v for k, v in agreed.items() if k in values}
    elif "head_dim" in values and values["head_dim"] is None:
        found["head_dim"] = WIDTH // HEADS
    return found | _layers(values)


def _merged(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in own.items():
        deeper = isinstance(value, dict) and isinstance(settings.get(key), dict)
        merged[key] = _merged(settings[key], value) if deeper else value
    return merged


def _token(key: str, value: Any) -> Any:
    if key in SPECIAL:
        return None if value is None else SPECIAL[key]
    if isinstance(value, int):
        return value if 0 <= value < VOCAB else VOCAB - 1
    return value


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """A layer of each kind, where a config lists kinds by layer; two at least."""
    key = next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if values.get(k)), None)
    if key is None:
        return {}
    count = values[key]
    lists = {k: v for k, v in values.items() if isinstance(v, list | tuple) and len(v) == count}
    kinds = list(zip(*lists.values(), strict=True)) or [()] * count
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(map(str, kinds))))}.values())
    if len(kept) > 6:
        kept = kept[:6]
    if len(kept) < 2:
        kept = list(range(min(2, count)))
    return {key: len(kept)} | {k: [v[i] for i in kept] for k, v in lists.items()}


def make_tiny(model_type: str, kind: str) -> nn.Module:
    """A small model in float32 whose attention matters: weights keep the scale of what they see."""
    config_class = CONFIG_MAPPING[model_type]
    settings = _merged(small_settings(config_class()), OWN.get(model_type, {}))
    if model_type == "reformer":
        settings["is_decoder"] = kind == "causal"
    config = config_class(**settings)
    torch.manual_seed(0)
    model = KINDS[kind][1].from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim < 2 or "A_log" in name:
                continue
            fan_in = parameter.shape[0 if "Conv1D" in name else -1]
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * fan_in**-0.5)
    return model


def make_inputs(kind: str, *, padded: bool) -> dict[str, torch.Tensor]:
    """Two rows; with padding, a part of the second row's tokens is none."""
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(3, VOCAB - 8, (2, LENGTH), generator=generator)}
    if padded:
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, slice(0, PADDED) if kind == "causal" else slice(-PADDED, None)] = 0
        inputs["attention_mask"] = mask
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, : LENGTH // 2].flip(0)
    return inputs

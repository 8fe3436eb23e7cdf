"""A torchtitan Llama as a transformers model."""

from typing import Any

import torch
from torch import Tensor
from torchtitan.models.llama3.model.args import TransformerModelArgs
from transformers import LlamaConfig, LlamaForCausalLM

from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.config import TransformConfig


def llama_config(
    args: TransformerModelArgs, *, seq_len: int, ffn_dim: int, token_ids: dict[str, int | None]
) -> LlamaConfig:
    """The Hugging Face config of a torchtitan Llama, RoPE as trained.

    Args:
        args: of the torchtitan model.
        seq_len: of the training, the longest position seen.
        ffn_dim: width of the feed-forward layer.
        token_ids: "bos", "eos" and "pad" of the tokenizer, where it has them.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rope_theta)}
    scaling = args.rope_scaling_args
    if scaling.scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads or args.n_heads,
        head_dim=args.dim // args.n_heads,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=seq_len,
        rope_parameters=rope,
        tie_word_embeddings=False,
        dtype=torch.float32,
        bos_token_id=token_ids.get("bos"),
        eos_token_id=token_ids.get("eos"),
        pad_token_id=token_ids.get("pad"),
    )


def build_model(
    config: LlamaConfig, state_dict: dict[str, Tensor], transform: TransformConfig | None = None
) -> LlamaForCausalLM:
    """A Llama with these very tensors (Hugging Face names), in evaluation mode.

    Args:
        config: of the model.
        state_dict: weights, and a transform's ranges where it has any.
        transform: to simulate; None = digital, ranges are left out. A module whose ranges are
            missing calibrates on its first batch.
    """
    model = LlamaForCausalLM(config)
    weights = {key: value for key, value in state_dict.items() if key.endswith(".weight")}
    model.load_state_dict(weights, assign=True)
    if transform is not None:
        transform_hf_model(model, transform)
        own = model.state_dict().keys()
        ranges = {k: v for k, v in state_dict.items() if k in own and k not in weights}
        model.load_state_dict(ranges, strict=False)
    return model.eval()

"""The Hugging Face side of a checkpoint: config.json, safetensors, and a transform beside them.

A folder of a simulated model has two more files: `transform.yaml`, the transform config, and
`transform.safetensors`, the ranges. The weights are digital, so that every loader reads them.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtitan.models.llama3.model.args import TransformerModelArgs
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from aixsim_cli.errors import UserError

TRANSFORM_FILE = "transform.yaml"
TRANSFORM_STATE_FILE = "transform.safetensors"


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


def build_model(config: LlamaConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """A Llama with these very weights (Hugging Face names), in evaluation mode."""
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights, config.json in the forms of transformers 4 and 5, generation_config.json."""
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    # transformers 4 reads these two keys alone, and would silently assume theta 10000, unscaled
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.get("dtype", "float32")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_transform(folder: Path, mapping: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    """Put a transform config and its ranges beside a model.

    Args:
        folder: of the model.
        mapping: the transform config.
        buffers: Hugging Face names -> float32 ranges (n, 2).
    """
    text = yaml.safe_dump(mapping, sort_keys=False)
    (folder / TRANSFORM_FILE).write_text(text, encoding="utf-8")
    save_file(buffers, folder / TRANSFORM_STATE_FILE)


def read_transform(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The transform config and ranges beside a model; None for a digital one.

    Raises:
        UserError: one of the two files is missing.
    """
    config, state = folder / TRANSFORM_FILE, folder / TRANSFORM_STATE_FILE
    if not config.is_file() and not state.is_file():
        return None
    for path in (config, state):
        if not path.is_file():
            raise UserError(
                f"{path}: missing; expected {TRANSFORM_FILE} and {TRANSFORM_STATE_FILE}"
            )
    return yaml.safe_load(config.read_text(encoding="utf-8")), load_file(state)

"""A torchtitan model outside a training run: to check a conversion, and to evaluate."""

import logging
from dataclasses import replace

import torch
from torch import Tensor
from torchtitan.models.llama3 import get_train_spec as get_llama3_spec
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

from aixsim_cli.config.flavors import FLAVORS, model_vocab_size
from aixsim_cli.errors import UserError
from aixsim_cli.models.titan.sites import titan_sites
from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.config import TransformConfig

logger = logging.getLogger("aixsim")


def model_args(arch: str, flavor: str, vocab_size: int) -> TransformerModelArgs:
    """The arguments of torchtitan's Llama for a flavor.

    Args:
        arch: "aixsim" (RoPE unscaled, vocabulary of the tokenizer) or "llama3" (torchtitan's own).
        flavor: name within the architecture.
        vocab_size: of the tokenizer.

    Raises:
        UserError: the tokenizer does not fit a llama3 flavor.
    """
    if arch == "llama3":
        args = replace(get_llama3_spec().model_args[flavor])  # pyright: ignore
        assert isinstance(args, TransformerModelArgs)
        model_vocab_size(arch, flavor, vocab_size)
        return args
    size = FLAVORS[arch][flavor]
    return TransformerModelArgs(
        dim=size.dim,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        n_kv_heads=size.n_kv_heads,
        vocab_size=vocab_size,
        multiple_of=size.multiple_of,
        ffn_dim_multiplier=size.ffn_dim_multiplier,
        norm_eps=size.norm_eps,
        rope_theta=size.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
    )


def meta_model(args: TransformerModelArgs) -> Transformer:
    """The model without storage: names and shapes."""
    with torch.device("meta"):
        return Transformer(args)


def build_model(
    args: TransformerModelArgs,
    state_dict: dict[str, Tensor],
    *,
    seq_len: int,
    transform: TransformConfig | None = None,
) -> Transformer:
    """A torchtitan Llama with these very weights, in evaluation mode on the CPU.

    Args:
        args: of the architecture and flavor.
        state_dict: torchtitan's names; ranges are used where the transform has them.
        seq_len: longest sequence it will see.
        transform: what to simulate; None = digital.

    Raises:
        UserError: the weights are not those of this architecture and flavor.
    """
    model = meta_model(replace(args, max_seq_len=seq_len))
    check_shapes(model, state_dict)
    state = None
    if transform is not None:
        state, report = apply_transform(model, transform, titan_sites(model))
        for note in report.notes:
            logger.warning("note: %s", note)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    if state is not None:
        state.reset()
    own = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in state_dict.items() if k in own}, strict=False)
    return model.eval()


def check_shapes(model: Transformer, state_dict: dict[str, Tensor]) -> None:
    """Compare names and shapes of all weights with the model's.

    Raises:
        UserError: naming the first few differences.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = {k: tuple(v.shape) for k, v in state_dict.items() if k.endswith(".weight")}
    wrong = [
        f"{name}: checkpoint has {weights.get(name, 'nothing')}, model has "
        f"{expected.get(name, 'nothing')}"
        for name in dict.fromkeys([*expected, *weights])
        if weights.get(name) != expected.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint is of another architecture or flavor: {'; '.join(wrong[:3])}{more}"
        )

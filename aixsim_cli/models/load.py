"""Load a language model for evaluation, from a torchtitan checkpoint or a Hugging Face source."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from aixsim_cli.data.tokenizer import check_vocabulary, load_tokenizer
from aixsim_cli.errors import UserError
from aixsim_cli.models.convert import DEFAULT_SEQ_LEN, as_hf_model, chosen_transform
from aixsim_cli.models.hf.config import transform_of
from aixsim_cli.models.hf.saved import load_model as load_hf_model
from aixsim_cli.models.hf.saved import ranges_of
from aixsim_cli.models.hf.sites import hf_sites
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.models.kind import SourceKind, find_source
from aixsim_cli.models.titan.model import build_model, model_args
from aixsim_cli.models.titan.saved import read_checkpoint
from aixsim_cli.models.titan.sites import titan_sites
from aixsim_cli.models.titan.tokenizer import trained_tokenizer
from aixsim_cli.run.device import device_type
from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.choice import KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import TransformState, state_of


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model ready to be evaluated.

    Args:
        module: torchtitan's or transformers' model, in evaluation mode.
        tokenizer: transformers tokenizer.
        seq_len: the longest sequence it was trained on.
        state: of its transform; None for a digital model.
        transform: what is simulated; None for a digital model.
    """

    module: nn.Module
    tokenizer: Any
    seq_len: int
    state: TransformState | None
    transform: TransformConfig | None

    @property
    def positions(self) -> int | None:
        """The longest sequence it can read; None = no limit that its config knows of."""
        if not isinstance(self.module, PreTrainedModel):
            return self.seq_len
        config: Any = self.module.config.get_text_config()
        known = getattr(config, "max_position_embeddings", None)
        return known if isinstance(known, int) and known > 0 else None

    @property
    def logits(self) -> Callable[[Tensor], Tensor]:
        """Tokens (B, L) int64 -> logits (B, L, vocabulary)."""
        if isinstance(self.module, PreTrainedModel):
            return lambda tokens: self.module(tokens, use_cache=False).logits
        return self.module

    @property
    def sites(self) -> list[Site]:
        """Every linear and attention of a digital model."""
        if isinstance(self.module, PreTrainedModel):
            return hf_sites(self.module)
        return titan_sites(self.module)

    @property
    def ranges(self) -> dict[str, Tensor]:
        """All running ranges of its simulated modules, as they are: name -> float32 (n, 2)."""
        return ranges_of(self.module)


def load_model(
    source: str,
    transform: Choice = KEEP_OWN,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    device: str | None = None,
    for_generation: bool = False,
) -> LanguageModel:
    """Load a model with the transform it was trained with, another one, or none.

    Args:
        source: torchtitan checkpoint folder, Hugging Face folder, or hub name.
        transform: to simulate.
        dtype: of weights and activations.
        trust_remote_code: run Python code that the model or its tokenizer brings.
        device: to run on; None = the accelerator that is there, else the CPU.
        for_generation: as a transformers model whatever the source, for its `generate`.

    Raises:
        UserError: the source or the transform cannot be used.
    """
    run_on = device or device_type()
    kind = getattr(torch, dtype)
    disable_progress_bar()
    if find_source(source) is SourceKind.TITAN:
        loaded = _load_titan(Path(source), transform, trust_remote_code, for_generation)
    else:
        loaded = _load_hf(source, transform, trust_remote_code, kind)
    loaded.module.to(run_on)
    for parameter in loaded.module.parameters():
        # not module.to(dtype): torchtitan's rotary table is complex
        parameter.data = parameter.data.to(kind)
    return loaded


def _load_titan(
    folder: Path, choice: Choice, trust_remote_code: bool, for_generation: bool
) -> LanguageModel:
    checkpoint = read_checkpoint(folder, choice)
    config = checkpoint.config
    if config is None:
        raise UserError(
            f"{folder}: has no config.yaml that names its flavor and tokenizer; convert it with "
            "aixsim convert-ckpt first"
        )
    transform = chosen_transform(checkpoint, folder, choice)
    # who made the checkpoint chose the tokenizer: it is trusted as little as the rest
    name = config.model.hf_assets_path
    tokenizer = trained_tokenizer(folder, name, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, checkpoint.vocab_size, name)
    arch, flavor, seq_len = config.model.name, config.model.flavor, config.training.seq_len
    if for_generation:
        module, _ = as_hf_model(arch, flavor, checkpoint, tokenizer, transform)
    else:
        args = model_args(arch, flavor, checkpoint.vocab_size)
        module = build_model(args, checkpoint.state_dict, seq_len=seq_len, transform=transform)
    return _language_model(module, tokenizer, seq_len, transform)


def _load_hf(
    source: str, choice: Choice, trust_remote_code: bool, dtype: torch.dtype
) -> LanguageModel:
    model = load_hf_model(source, choice, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    embedding: Any = model.get_input_embeddings()
    check_vocabulary(tokenizer, embedding.weight.shape[0], source)
    seq_len = getattr(model.config, "max_position_embeddings", DEFAULT_SEQ_LEN)
    return _language_model(model.eval(), tokenizer, seq_len, transform_of(model))


def _language_model(
    module: nn.Module, tokenizer: Any, seq_len: int, transform: TransformConfig | None
) -> LanguageModel:
    state = state_of(module)
    return LanguageModel(module, tokenizer, seq_len, state, transform)


@torch.no_grad()
def simulated(
    digital: LanguageModel, transform: TransformConfig, ranges: Mapping[str, Tensor]
) -> LanguageModel:
    """A digital model on simulated hardware, as if it had been loaded so; nothing is read again.

    Args:
        digital: it stays as it is; both have the very same weights.
        transform: to simulate.
        ranges: of the model where it has been simulated before, by `LanguageModel.ranges`; those
            that both have are used, the others are not set.

    Raises:
        ConfigError: the transform does not fit.
    """
    weights: dict[int, Any] = {id(weight): weight for weight in digital.module.parameters()}
    module = copy.deepcopy(digital.module, weights)
    if isinstance(module, PreTrainedModel):
        transform_hf_model(module, transform)
    else:
        apply_transform(module, transform, titan_sites(module))
    model = replace(digital, module=module.eval(), state=state_of(module), transform=transform)
    for name, own in model.ranges.items():
        if name in ranges and ranges[name].shape == own.shape:
            own.copy_(ranges[name])
    return model

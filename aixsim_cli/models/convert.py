"""torchtitan checkpoint <-> Hugging Face folder, each way checked: digitally, and as simulated."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.models.llama3.model.args import TransformerModelArgs
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from aixsim_cli.config.pretrain import CONFIG_FILE, PretrainConfig, build_config, dump_config
from aixsim_cli.data.tokenizer import check_vocabulary
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.models import llama
from aixsim_cli.models.agree import difference_in_step
from aixsim_cli.models.hf.config import transform_of
from aixsim_cli.models.hf.saved import Form, load_model, ranges_of, write_model
from aixsim_cli.models.titan.model import build_model as build_titan_model
from aixsim_cli.models.titan.model import check_shapes, meta_model, model_args
from aixsim_cli.models.titan.saved import TitanCheckpoint, read_checkpoint, write_checkpoint
from aixsim_cli.models.titan.sites import StateDictAdapter
from aixsim_cli.models.titan.tokenizer import trained_tokenizer
from aixsim_cli.run.manifest import is_complete, maker_of
from aixsim_cli.run.replace import new_folder
from aixsim_cli.run.signals import ends_on_sigterm
from aixsim_cli.settings.document import Document
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig

logger = logging.getLogger("aixsim")
CHECKED_TOKENS = 128
LOGIT_TOLERANCE = 1e-4
DEFAULT_SEQ_LEN = 2048
MAKER = "convert-ckpt"


def titan_to_hf(
    arch: str,
    flavor: str,
    source: Path,
    target: Path,
    *,
    tokenizer: str | None,
    form: Form = "aixsim",
    transform: Choice = KEEP_OWN,
    force: bool,
    trust_remote_code: bool = False,
) -> float:
    """Write a torchtitan checkpoint as a Hugging Face folder.

    Args:
        arch: architecture, "aixsim" or "llama3".
        flavor: within the architecture.
        source: a `step-N` folder.
        target: a new folder, whole or not there at all.
        tokenizer: whose files to add; None = the training's.
        form: of the folder, see `models/hf/saved.py`.
        transform: `DIGITAL` writes the weights alone, without what they were trained with.
        force: replace a target that a conversion made, see `run/replace.py`.
        trust_remote_code: run Python code that the tokenizer brings.

    Returns:
        The largest difference between the two models' logits on a few tokens, digital and
        simulated.

    Raises:
        UserError: source unreadable or of another flavor; target in the way.
        RunError: the logits differ by more than 1e-4, or other modules are simulated.
    """
    disable_progress_bar()
    with _target(target, source, force) as folder:
        checkpoint = read_checkpoint(source, transform)
        name = tokenizer or (checkpoint.config and checkpoint.config.model.hf_assets_path)
        if name is None:
            raise UserError(
                f"{source}: no config.yaml names its tokenizer; expected --tokenizer-path"
            )
        is_given = tokenizer is not None
        tokens = trained_tokenizer(
            source, name, is_given=is_given, trust_remote_code=trust_remote_code
        )
        check_vocabulary(tokens, checkpoint.vocab_size, name)
        chosen = chosen_transform(checkpoint, source, transform)
        model, args = as_hf_model(arch, flavor, checkpoint, tokens, chosen)
        tokens.model_max_length = model.config.max_position_embeddings
        write_model(model, folder, form)
        tokens.save_pretrained(folder)
        simulated = load_model(str(folder), dtype=torch.float32).eval()
        _check_ranges(model, simulated)
        difference = _check_logits(args, checkpoint.state_dict, load_llama(str(folder)))
        in_step = _check_simulation(args, checkpoint.state_dict, chosen, simulated)
        return max(difference, in_step)


def chosen_transform(
    checkpoint: TitanCheckpoint, source: Path, choice: Choice
) -> TransformConfig | None:
    """The transform that a checkpoint is used with; None = digital.

    Args:
        checkpoint: from `read_checkpoint`.
        source: its folder, for messages.
        choice: its own, another, or none.

    Raises:
        UserError: it has ranges, and its config names no hardware.
    """
    if isinstance(choice, TransformConfig):
        return choice
    if choice is DIGITAL:
        return None
    transform = checkpoint.config and checkpoint.config.transform_config
    ranges = [name for name in checkpoint.state_dict if name.endswith(".ranges")]
    if transform is None and ranges:
        raise UserError(
            f"{source}/config.yaml: transform: names no hardware, and the weights hold "
            f"{ranges[0]}; expected the config as it was saved, or --no-transform"
        )
    return transform


def as_hf_model(
    arch: str,
    flavor: str,
    checkpoint: TitanCheckpoint,
    tokenizer: Any,
    transform: TransformConfig | None,
) -> tuple[LlamaForCausalLM, TransformerModelArgs]:
    """A torchtitan checkpoint as a transformers model.

    Args:
        arch: architecture.
        flavor: within it.
        checkpoint: from `read_checkpoint`.
        tokenizer: a transformers tokenizer, for the ids of the special tokens.
        transform: to simulate, with the checkpoint's ranges; None = digital.

    Returns:
        The model, and torchtitan's arguments for it.

    Raises:
        UserError: the checkpoint is of another architecture or flavor.
    """
    args = model_args(arch, flavor, checkpoint.vocab_size)
    check_shapes(meta_model(args), checkpoint.state_dict)
    renamed = StateDictAdapter(args).to_hf(checkpoint.state_dict)
    config = llama.llama_config(
        args,
        seq_len=checkpoint.config.training.seq_len if checkpoint.config else DEFAULT_SEQ_LEN,
        ffn_dim=checkpoint.state_dict["layers.0.feed_forward.w1.weight"].shape[0],
        token_ids={kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
    )
    return llama.build_model(config, renamed, transform), args


def hf_to_titan(
    arch: str,
    flavor: str,
    source: str,
    target: Path,
    *,
    transform: Choice = KEEP_OWN,
    force: bool,
    trust_remote_code: bool = False,
) -> float:
    """Write a Hugging Face model as a torchtitan checkpoint that `pretrain` can start from.

    Its config.yaml names model, tokenizer and hardware, so that it can be evaluated and converted.

    Args:
        arch: architecture, "aixsim" or "llama3".
        flavor: within the architecture.
        source: a folder or a hub name.
        target: a new folder, whole or not there at all.
        transform: as of `titan_to_hf`.
        force: as of `titan_to_hf`.
        trust_remote_code: run Python code that the model brings.

    Returns:
        The largest difference between the two models' logits on a few tokens, digital and
        simulated.

    Raises:
        UserError: the model is of another flavor, or has a RoPE that the architecture lacks.
        RunError: the logits differ by more than 1e-4, or other modules are simulated.
    """
    disable_progress_bar()
    local = Path(source) if Path(source).is_dir() else None
    with _target(target, local, force) as folder:
        model = load_llama(source, trust_remote_code=trust_remote_code)
        args = model_args(arch, flavor, model.config.vocab_size)
        _check_config(model.config, args, source)
        adapter = StateDictAdapter(args)
        weights = model.state_dict()
        if model.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        state_dict = adapter.from_hf({k: v.contiguous() for k, v in weights.items()})
        simulated = load_model(
            source,
            transform,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
        state_dict |= adapter.from_hf(ranges_of(simulated))
        check_shapes(meta_model(args), state_dict)
        dump_config(_config_of(arch, flavor, source, simulated), folder / CONFIG_FILE)
        write_checkpoint(state_dict, folder)
        written = read_checkpoint(folder)
        difference = _check_logits(args, written.state_dict, model)
        own = chosen_transform(written, folder, KEEP_OWN)
        in_step = _check_simulation(args, written.state_dict, own, simulated.eval())
        return max(difference, in_step)


def _config_of(arch: str, flavor: str, source: str, model: PreTrainedModel) -> PretrainConfig:
    """What a Hugging Face folder says of a run: model, tokenizer, length and hardware."""
    local, transform = Path(source).is_dir(), transform_of(model)
    sections: dict[str, Any] = {
        "model": {
            "name": arch,
            "flavor": flavor,
            "hf_assets_path": str(Path(source).resolve()) if local else source,
        },
        # the folder does not say on what it was trained
        "training": {"seq_len": model.config.max_position_embeddings, "dataset": "builtin"},
        "transform": transform and dict(transform.mapping),
    }
    return build_config(Document(sections, source))


def load_llama(source: str, *, trust_remote_code: bool = False) -> LlamaForCausalLM:
    """A digital Llama from a folder or the hub, in float32.

    Args:
        source: folder or hub name.
        trust_remote_code: run Python code that the model brings.

    Raises:
        UserError: it cannot be loaded, or is no Llama.
    """
    model = load_model(source, DIGITAL, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"{source}: got model_type {model.config.model_type}; expected llama")
    return model.eval()


def _check_config(config: LlamaConfig, args: TransformerModelArgs, source: str) -> None:
    sizes = {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
    }
    other = [
        f"{key}: got {getattr(config, key)}; this flavor has {size}"
        for key, size in sizes.items()
        if getattr(config, key) != size
    ]
    if other:
        # what else differs follows from that
        raise UserError(f"{source}/config.json: another flavor: {'; '.join(other)}")
    rope = dict(config.rope_parameters or {})
    scaled = args.rope_scaling_args.scaling_factor != 1.0
    expected = {"rope_type": "llama3" if scaled else "default", "rope_theta": args.rope_theta}
    wrong = [
        f"{key}: {source}/config.json has {rope.get(key)}; this flavor has {value}"
        for key, value in expected.items()
        if rope.get(key) != value
    ]
    if config.rms_norm_eps != args.norm_eps:
        wrong.append(
            f"rms_norm_eps: {source}/config.json has {config.rms_norm_eps}; this flavor has "
            f"{args.norm_eps}"
        )
    if wrong:
        raise UserError(
            "; ".join(wrong)
            + " (if the model was trained as the flavor is, correct its config.json)"
        )


def _check_ranges(written: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    before, after = ranges_of(written), ranges_of(reloaded)
    same = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    if not same:
        raise RunError("the converted model's ranges differ from its source's; nothing was written")


@torch.no_grad()
def _check_logits(
    args: TransformerModelArgs, state_dict: dict[str, Tensor], model: LlamaForCausalLM
) -> float:
    tokens = _tokens(args, model)
    titan = build_titan_model(args, state_dict, seq_len=tokens.shape[1])
    return _small_enough((titan(tokens) - model(tokens).logits).abs().max().item(), "logits")


def _check_simulation(
    args: TransformerModelArgs,
    state_dict: dict[str, Tensor],
    transform: TransformConfig | None,
    model: PreTrainedModel,
) -> float:
    tokens = _tokens(args, model)
    titan = build_titan_model(args, state_dict, seq_len=tokens.shape[1], transform=transform)
    return _small_enough(difference_in_step(args, titan, model, tokens), "simulated logits")


def _tokens(args: TransformerModelArgs, model: PreTrainedModel) -> Tensor:
    length = min(CHECKED_TOKENS, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(args.vocab_size, (1, length), generator=generator)


def _small_enough(difference: float, what: str) -> float:
    if not difference <= LOGIT_TOLERANCE:
        raise RunError(
            f"the converted model's {what} differ by {difference:.2e} (allowed: "
            f"{LOGIT_TOLERANCE:.0e}); nothing was written"
        )
    return difference


def _check_no_run(target: Path) -> None:
    """A run would go on from what has the name of its next checkpoint."""
    kind = re.fullmatch(r"(step|checkpoint)-\d+", target.name)
    if kind is None:
        return
    for other in sorted(target.parent.glob(f"{kind[1]}-*")):
        is_run = (other / ".metadata").is_file() or (other / "trainer_state.json").is_file()
        is_ours = is_complete(other) and maker_of(other) == MAKER
        if other != target and is_run and not is_ours:
            raise UserError(
                f"{target}: lies among the checkpoints of a run, beside {other.name}, and the run "
                "would go on from it; expected a new folder elsewhere"
            )


@contextmanager
def _target(target: Path, source: Path | None, force: bool) -> Iterator[Path]:
    _check_no_run(target)
    with (
        ends_on_sigterm(),
        new_folder(target, maker=MAKER, force=force, source=source) as folder,
    ):
        yield folder

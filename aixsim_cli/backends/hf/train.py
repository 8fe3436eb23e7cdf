"""Continual pretraining: HF's Trainer on a model with simulated hardware under it."""

import logging
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import upload_folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from aixsim_cli import __version__
from aixsim_cli.backends.hf import folder as hf_folder
from aixsim_cli.backends.hf.apply import transform_hf_model
from aixsim_cli.backends.hf.arguments import Arguments, ModelArguments, set_steps_and_batch
from aixsim_cli.backends.hf.card import write_card
from aixsim_cli.backends.hf.data import load_blocks
from aixsim_cli.backends.hf.trainer import SimulationTrainer
from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.run.manifest import write_manifest
from aixsim_cli.run.signals import EXIT_CODES
from aixsim_cli.source import check_hf_source
from aixsim_cli.transforms.config import (
    TransformConfig,
    hardware_difference,
    load_transform_file,
    parse_transform,
    without_lora,
)
from aixsim_cli.transforms.lora import add_lora, merge_lora
from aixsim_cli.transforms.state import state_of

logger = logging.getLogger("aixsim")
LONGEST_DEFAULT_BLOCK = 1024


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        folder: where the model was saved; None when nothing was trained.
        metrics: Trainer's, of training and evaluation.
    """

    folder: Path | None
    metrics: dict[str, float]


def continual_pretrain(arguments: Arguments) -> Result:
    """Train and evaluate as the arguments say, and save the model with its hardware.

    Raises:
        UserError: a model, text or setting that cannot be used.
        RunError: the loss or the weights stopped being finite.
        SystemExit: a signal stopped the run, after a checkpoint (see `signals.EXIT_CODES`).
    """
    training = arguments.training
    _log_on_main(training)
    resume_from = _checkpoint(arguments)
    set_seed(training.seed)
    transform = _transform(arguments)
    # before the tokenizer, which would be looked for in the same place
    _check_source(arguments.model)
    tokenizer = _tokenizer(arguments)
    model = _model(arguments.model, transform, len(tokenizer))
    if resume_from is not None:
        _check_hardware(Path(resume_from), model)
    block_size = _block_size(arguments, model)
    set_steps_and_batch(arguments, _parameters(model), block_size)
    blocks = load_blocks(arguments, tokenizer, block_size)
    trainer = SimulationTrainer(
        transform=state_of(model),
        model=model,
        args=training,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    metrics: dict[str, float] = {}
    if training.do_train:
        metrics |= _train(trainer, resume_from)
    if training.do_eval:
        found = trainer.evaluate()
        # not clipped: a perplexity beyond what a float holds is infinite
        found["perplexity"] = _exp(found["eval_loss"])
        metrics |= found
        trainer.save_metrics("eval", found)
    if not training.do_train:
        return Result(None, metrics)
    return Result(_save(trainer, arguments, metrics), metrics)


def _train(trainer: SimulationTrainer, resume_from: str | None) -> dict[str, float]:
    stop = trainer.stop
    with stop.signals:
        metrics = trainer.train(resume_from_checkpoint=resume_from).metrics
    if not stop.stopped_by:
        return metrics
    logger.info(
        "stopped by %s after step %d, checkpoint %s/checkpoint-%d; the same command with "
        "--resume_from_checkpoint true goes on from there",
        signal.Signals(stop.stopped_by).name,
        trainer.state.global_step,
        trainer.args.output_dir,
        trainer.state.global_step,
    )
    raise SystemExit(EXIT_CODES[stop.stopped_by])


def _save(trainer: SimulationTrainer, arguments: Arguments, metrics: dict[str, float]) -> Path:
    folder = Path(str(arguments.training.output_dir))
    form: hf_folder.Form = "aixsim"
    if arguments.simulation.strict or arguments.simulation.plain:
        form = "strict" if arguments.simulation.strict else "plain"
    _merge(trainer.accelerator.unwrap_model(trainer.model))
    # sharded weights are gathered by the Trainer; every rank takes part. Not yet the whole folder,
    # so nothing is pushed from there
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    trainer.save_metrics("train", {k: v for k, v in metrics.items() if not k.startswith("eval_")})
    if trainer.is_world_process_zero():
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        hf_folder.finish_folder(model, folder, form)
        write_card(folder, model, arguments, metrics)
        # checkpoints within it come and go
        write_manifest(folder, recurse=False)
        if arguments.training.push_to_hub:
            _push(trainer, folder)
    return folder


def _merge(model: Any) -> None:
    """Put low-rank updates into the weights: what is saved is the hardware and its weights."""
    if not merge_lora(model):
        return
    saved = model.config.quantization_config
    saved.transform = without_lora(saved.transform)


def _push(trainer: SimulationTrainer, folder: Path) -> None:
    # Trainer's own push would save the model once more, in the default form
    try:
        upload_folder(
            repo_id=str(trainer.hub_model_id),
            folder_path=folder,
            commit_message=f"Trained by aixsim {__version__}",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
            ignore_patterns=["checkpoint-*", "training_args.bin"],
        )
    except Exception as error:  # what a failed connection raises differs between hub versions
        raise RunError(f"{folder} is saved, but was not pushed to the hub: {error}") from error


def _transform(arguments: Arguments) -> TransformConfig | None:
    path = arguments.simulation.transform_config
    if path is None:
        return None
    return parse_transform(load_transform_file(path), source=path)


def _tokenizer(arguments: Arguments) -> Any:
    model = arguments.model
    name = model.tokenizer_name or model.model_name_or_path or model.config_name
    if model.tokenizer_name is not None:
        name = str(resolve_tokenizer(model.tokenizer_name))
    try:
        return AutoTokenizer.from_pretrained(
            name,
            cache_dir=model.cache_dir,
            use_fast=model.use_fast_tokenizer,
            token=model.token,
            trust_remote_code=model.trust_remote_code,
            revision=model.model_revision if model.tokenizer_name is None else "main",
        )
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"tokenizer {name}: cannot be loaded: {first}; expected --tokenizer_name"
        ) from error


def _model(
    arguments: ModelArguments, transform: TransformConfig | None, tokens: int
) -> PreTrainedModel:
    if arguments.model_name_or_path is None:
        model = _from_scratch(arguments, tokens)
        if transform is not None:
            transform_hf_model(model, transform)
    else:
        options: dict[str, Any] = _of_hub(arguments) | {"dtype": arguments.dtype or "float32"}
        if arguments.attn_implementation is not None:
            options["attn_implementation"] = arguments.attn_implementation
        model, _ = hf_folder.load_model(
            arguments.model_name_or_path, transform=transform, **options
        )
    embedding = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    if tokens > embedding:
        raise UserError(
            f"the tokenizer has {tokens} tokens and the model {embedding}; expected the model's "
            "own tokenizer (--tokenizer_name)"
        )
    state = state_of(model)
    if state is not None:
        logger.info("%d modules are simulated", len(state.modules))
        updated = add_lora(model)
        if updated:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            logger.info("%d of them train low-rank updates, %d numbers", len(updated), trained)
    return model


def _check_source(arguments: ModelArguments) -> None:
    name = str(arguments.model_name_or_path or arguments.config_name)
    check_hf_source(name)
    hf_folder.load_config(name, **_of_hub(arguments))


def _of_hub(arguments: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def _from_scratch(arguments: ModelArguments, tokens: int) -> PreTrainedModel:
    config = hf_folder.load_config(str(arguments.config_name), **_of_hub(arguments))
    try:
        if arguments.config_overrides:
            config.update_from_string(arguments.config_overrides)
    except (ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"--config_overrides {arguments.config_overrides}: {first}") from error
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    config.vocab_size = max(config.vocab_size, tokens)
    dtype = getattr(torch, arguments.dtype or "float32")
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _block_size(arguments: Arguments, model: PreTrainedModel) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    asked = arguments.data.block_size
    if asked is None:
        return min(longest or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
    if longest is not None and asked > longest:
        raise UserError(f"--block_size: got {asked}; the model's longest sequence is {longest}")
    return asked


def _parameters(model: PreTrainedModel) -> int:
    """All but the input embedding, as a pretraining's token budget counts them."""
    embedding = model.get_input_embeddings()
    skipped = set() if model.config.tie_word_embeddings else {id(p) for p in embedding.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


def _checkpoint(arguments: Arguments) -> str | None:
    """The checkpoint to resume from: as asked, none otherwise; a finished folder is not reused."""
    training = arguments.training
    output = Path(str(training.output_dir))
    asked = training.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "false"):
        if not Path(asked).is_dir():
            raise UserError(f"--resume_from_checkpoint: {asked}: no such folder")
        return asked
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if asked is not None and str(asked).lower() == "true":
        if last is None:
            raise UserError(f"--resume_from_checkpoint: {output} holds no checkpoint-N")
        return last
    if training.do_train and asked is None and (last or (output / "config.json").is_file()):
        raise UserError(
            f"--output_dir: {output} holds {'checkpoints' if last else 'a model'} already; "
            "expected a new folder, or --resume_from_checkpoint true"
        )
    return None


def _check_hardware(checkpoint: Path, model: PreTrainedModel) -> None:
    """Trainer loads of a checkpoint what fits the model, and begins the rest anew."""
    saved, asked = hf_folder.transform_in(checkpoint), hf_folder.saved_transform(model)
    difference = hardware_difference(saved, asked, source=str(checkpoint))
    if difference is None:
        return
    began, asks = difference
    raise UserError(
        f"--resume_from_checkpoint: {checkpoint} is of a run on {began}, and this run is on {asks};"
        " expected the hardware that the run began with (--transform_config), or a new --output_dir"
    )


def _log_on_main(training: Any) -> None:
    main = training.process_index == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if main else logging.ERROR)
    if not main:
        transformers.logging.set_verbosity_error()
    # many processes tokenise; the library's own threads would fight with them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

"""Continual pretraining: HF's Trainer on a model with simulated hardware under it."""

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from aixsim_cli.continual import identity, resume
from aixsim_cli.continual.arguments import Arguments, ModelArguments, set_steps_and_batch
from aixsim_cli.continual.data import load_blocks
from aixsim_cli.continual.save import check_writable, push, save_finished, write_results
from aixsim_cli.continual.trainer import SimulationTrainer
from aixsim_cli.data.tokenizer import load_tokenizer, resolve_tokenizer
from aixsim_cli.errors import RunError, Stopped, UserError, first_line
from aixsim_cli.models.hf import saved as hf_saved
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.models.kind import check_hf_source
from aixsim_cli.run import log, ranks
from aixsim_cli.run.folder import check_free_space, locked
from aixsim_cli.run.nonfinite import NonfinitePolicy
from aixsim_cli.run.replace import finish_publishing
from aixsim_cli.run.resume import describe
from aixsim_cli.run.signals import say_stopped
from aixsim_cli.transforms.choice import Choice
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.lora import add_lora
from aixsim_cli.transforms.state import state_of

logger = logging.getLogger("aixsim")
LONGEST_DEFAULT_BLOCK = 1024
_FOLDER_KEY = "--output_dir"


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        folder: where the model was saved; None when none was.
        metrics: Trainer's, of training and evaluation.
    """

    folder: Path | None
    metrics: dict[str, float]


def continual_pretrain(arguments: Arguments) -> Result:
    """Train and evaluate as the arguments say, and save the model with its hardware.

    Raises:
        UserError: a model, text, folder or setting that cannot be used.
        RunError: the loss or the weights stopped being finite, or a save failed.
        Stopped: by a signal, after a checkpoint.
    """
    output = Path(str(arguments.training.output_dir))
    _set_up_logs(arguments.training.process_index == 0)
    if not ranks.is_main():
        return _run(arguments, output)
    with locked(output, _FOLDER_KEY):
        check_writable(output, _FOLDER_KEY)
        try:
            finish_publishing(output, resume.checkpoints_in(output).aside)
        except OSError as error:
            raise RunError(
                f"{output}: the model that a killed run saved cannot be put in place: {error}"
            ) from error
        return _run(arguments, output)


def _run(arguments: Arguments, output: Path) -> Result:
    training = arguments.training
    checkpoint = resume.find_checkpoint(arguments)
    set_seed(training.seed)
    # before the tokenizer, which would be looked for in the same place
    _check_source(arguments.model)
    tokenizer = _tokenizer(arguments)
    model = _model(arguments.model, arguments.transform, len(tokenizer))
    if checkpoint is not None:
        identity.check_model(checkpoint, model, arguments)
    block_size = _block_size(arguments, model)
    set_steps_and_batch(arguments, _parameters(model), block_size)
    blocks = load_blocks(arguments, tokenizer, block_size)
    trainer = SimulationTrainer(
        transform=state_of(model),
        policy=NonfinitePolicy(
            arguments.simulation.on_nonfinite, arguments.simulation.max_nonfinite, "--max_nonfinite"
        ),
        model=model,
        args=training,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if not training.do_train:
        _check_whose(output, arguments.model)
        metrics = _evaluate(trainer)
        if ranks.is_main():
            write_results(output, metrics)
        return Result(None, metrics)
    trainer.settings = identity.settings_of(
        arguments,
        steps=trainer.planned_steps(),
        block_size=block_size,
        blocks=len(blocks["train"]) if hasattr(blocks["train"], "__len__") else None,
        held_out=blocks.get("validation"),
    )
    trainer.inputs = identity.inputs_of(arguments, tokenizer, blocks["train"])
    if checkpoint is not None and _has_all_steps(trainer, checkpoint, arguments):
        return _finish(trainer, arguments, checkpoint)
    if checkpoint is not None:
        resume.check_files(checkpoint, arguments)
        trainer.check_best()
    if ranks.is_main():
        check_free_space(output, trainer.checkpoint_bytes(), _FOLDER_KEY)
    resume.clear_the_way(output, checkpoint)
    trainer.best.clear_the_way(trainer.checkpoints)
    metrics = _train(trainer, checkpoint)
    if training.do_eval:
        metrics |= _evaluate(trainer)
    return Result(save_finished(trainer, arguments, metrics), metrics)


def _has_all_steps(trainer: SimulationTrainer, checkpoint: Path, arguments: Arguments) -> bool:
    """Compare a checkpoint with the run, and say what differs; whether nothing is left to train."""
    now, step = trainer.settings, resume.read_state(checkpoint).global_step
    last = now["max_steps"]
    resume.check_steps(checkpoint, step, last)
    saved = identity.read_settings(checkpoint)
    if now[identity.BEST_BY] is None:
        # nothing is chosen now: what was best stays so
        now[identity.BEST_BY] = saved.get(identity.BEST_BY)
    changed = identity.changes(saved, now)
    other_data = identity.check_identity(checkpoint, changed, arguments, trainer.inputs)
    is_there = ranks.from_main(Path(str(arguments.training.output_dir), "config.json").is_file())
    # a best one whose model is there already is not chosen anew
    is_chosen = step == last and is_there and saved.get(identity.BEST_BY) is not None
    by_the_same = is_chosen or identity.BEST_BY not in changed
    trainer.best.find(checkpoint, trainer.checkpoints.root, by_the_same=by_the_same)
    if step == last:
        takes_best = arguments.training.load_best_model_at_end and not is_chosen
        identity.check_finished(
            checkpoint, step, changed, other_data=other_data, takes_best=takes_best
        )
    else:
        form = None
        with suppress(UserError):
            # a damaged model is about to be replaced
            form = hf_saved.form_of(Path(str(arguments.training.output_dir)))
        if form not in (arguments.simulation.form, None):
            changed |= {"form": (form, arguments.simulation.form)}
    read_anew = other_data or arguments.training.ignore_data_skip
    logger.info(describe(step, checkpoint, changed, last, other_data=read_anew and step < last))
    return step == last


def _finish(trainer: SimulationTrainer, arguments: Arguments, checkpoint: Path) -> Result:
    """Nothing is left to train: a finished folder stays as it is, another one gets its model."""
    output = Path(str(arguments.training.output_dir))
    state = resume.read_state(checkpoint)
    is_finished = resume.holds_model_of(output, checkpoint, state.global_step)
    if is_finished:
        resume.check_form(output, arguments.simulation.form)
        has_best = state.best_model_checkpoint is not None
        resume.check_end(output, is_best=arguments.training.load_best_model_at_end and has_best)
        if arguments.training.push_to_hub and ranks.is_main():
            push(trainer, output)
    if is_finished and not arguments.training.do_eval:
        return Result(None, {})
    if not is_finished:
        logger.warning("%s: the results of the training were lost when the run was ended", output)
    trainer.restore(checkpoint)
    metrics = _evaluate(trainer) if arguments.training.do_eval else {}
    if not is_finished:
        return Result(save_finished(trainer, arguments, metrics), metrics)
    if ranks.is_main():
        write_results(output, metrics)
    return Result(None, metrics)


def _check_whose(output: Path, model: ModelArguments) -> None:
    """Results lie beside the model that they are of."""
    source = Path(str(model.model_name_or_path))
    holds = ranks.from_main((output / "config.json").is_file())
    if holds and output.resolve() != source.resolve():
        raise UserError(
            f"--output_dir: {output} holds a model, and this run evaluates {source}; expected that "
            "model, or another folder for the results"
        )


def _evaluate(trainer: SimulationTrainer) -> dict[str, float]:
    with trainer.weights_kept():
        found = trainer.evaluate()
    # not clipped: a perplexity beyond what a float holds is infinite
    return found | {"perplexity": _exp(found["eval_loss"])}


def _train(trainer: SimulationTrainer, checkpoint: Path | None) -> dict[str, float]:
    stop, path = trainer.watch, None if checkpoint is None else str(checkpoint)
    with stop.signals:
        metrics = trainer.train(resume_from_checkpoint=path).metrics
    if not stop.stopped_by:
        return metrics
    goes_on = "the same command with --resume_from_checkpoint true goes on from there"
    if trainer.args.save_only_model:
        goes_on = "which --save_only_model left without what going on needs"
    step = trainer.state.global_step
    kept = f"checkpoint {trainer.args.output_dir}/checkpoint-{step}; {goes_on}"
    say_stopped(stop.stopped_by, step, kept)
    raise Stopped(stop.stopped_by)


def _tokenizer(arguments: Arguments) -> Any:
    model = arguments.model
    name = model.tokenizer_name or model.model_name_or_path or model.config_name
    if model.tokenizer_name is not None:
        name = str(resolve_tokenizer(model.tokenizer_name))
    return load_tokenizer(
        str(name),
        trust_remote_code=model.trust_remote_code,
        cache_dir=model.cache_dir,
        use_fast=model.use_fast_tokenizer,
        token=model.token,
        revision=model.model_revision if model.tokenizer_name is None else "main",
    )


def _model(arguments: ModelArguments, transform: Choice, tokens: int) -> PreTrainedModel:
    if arguments.model_name_or_path is None:
        model = _from_scratch(arguments, tokens)
        if isinstance(transform, TransformConfig):
            transform_hf_model(model, transform)
    else:
        options: dict[str, Any] = _of_hub(arguments) | {"dtype": arguments.dtype or "float32"}
        if arguments.attn_implementation is not None:
            options["attn_implementation"] = arguments.attn_implementation
        model = hf_saved.load_model(arguments.model_name_or_path, transform, **options)
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
    hf_saved.load_config(name, **_of_hub(arguments))


def _of_hub(arguments: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def _from_scratch(arguments: ModelArguments, tokens: int) -> PreTrainedModel:
    config = hf_saved.load_config(str(arguments.config_name), **_of_hub(arguments))
    try:
        if arguments.config_overrides:
            config.update_from_string(arguments.config_overrides)
    except (ValueError, KeyError) as error:
        first = first_line(error)
        raise UserError(f"--config_overrides {arguments.config_overrides}: {first}") from error
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    config.vocab_size = max(config.vocab_size, tokens)
    dtype = getattr(torch, arguments.dtype or "float32")
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, trust_remote_code=arguments.trust_remote_code
    )


def _block_size(arguments: Arguments, model: PreTrainedModel) -> int:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and longest < 1:
        # that of XLNet is -1: it has no longest
        longest = None
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


def _set_up_logs(is_main: bool) -> None:
    # all ranks meet the same, and one speaks of it
    log.set_up(is_main=is_main, others=logging.ERROR)
    if not is_main:
        transformers.logging.set_verbosity_error()
    # many processes tokenise; the library's own threads would fight with them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

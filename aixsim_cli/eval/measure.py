"""Perplexity of a source under a transform: load, calibrate where needed, score."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor

from aixsim_cli.data.sources import open_source
from aixsim_cli.data.windows import heldout_windows
from aixsim_cli.errors import UserError
from aixsim_cli.eval.calibrate import calibrate, has_ranges, needs_calibration
from aixsim_cli.eval.perplexity import perplexity
from aixsim_cli.models.load import LanguageModel, load_model
from aixsim_cli.transforms.choice import KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig

logger = logging.getLogger("aixsim")


@dataclass(frozen=True)
class Text:
    """What a model reads.

    Args:
        dataset: a key of `SOURCES`.
        path: files, of dataset "local".
        batch_size: windows a forward.
        num_batches: read so many; None = all.
        seq_len: tokens a window; None = that of the model's training.
        part: of the dataset.
    """

    dataset: str
    path: str | None
    batch_size: int
    num_batches: int | None
    seq_len: int | None
    part: Literal["train", "heldout"] = "heldout"

    def windows(self, model: LanguageModel) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels), int64 (seq_len,) each.

        Raises:
            UserError: the windows are longer than the model can read, or the text cannot be read.
        """
        if self.seq_len is not None and self.seq_len > (model.positions or self.seq_len):
            raise UserError(
                f"--seq-len: got {self.seq_len}; expected at most {model.positions}, the positions "
                "that the model has"
            )
        rows = cast(Iterable[dict[str, Any]], open_source(self.dataset, self.path, self.part))
        texts = (row["text"] for row in rows)
        return heldout_windows(texts, model.tokenizer, self.seq_len or model.seq_len)


@dataclass(frozen=True)
class Calibration:
    """How ranges are set that training did not set.

    Args:
        num_batches: of text, of the size that is scored.
        path: its files; None = the training part of the dataset that is scored.
        anew: set those too that training set.
    """

    num_batches: int
    path: str | None
    anew: bool = False

    @property
    def reason(self) -> str:
        """Why a model is calibrated."""
        asked = "its ranges are set anew"
        return asked if self.anew else "the model was not trained with this transform"

    def text(self, scored: Text) -> Text:
        """The text to calibrate on.

        Raises:
            UserError: dataset "local" has no training part of its own.
        """
        if self.path is not None:
            scored = replace(scored, dataset="local", path=self.path)
        elif scored.dataset == "local":
            raise UserError(
                f"--calibration-path: missing; {self.reason}, and ranges must be set on text other "
                "than what is scored"
            )
        return replace(scored, num_batches=self.num_batches, part="train")


def needs_ranges(model: LanguageModel, calibration: Calibration) -> bool:
    """Whether a model has ranges that are not set, or are to be set anew."""
    return (calibration.anew and has_ranges(model)) or needs_calibration(model)


def calibrate_for(model: LanguageModel, scored: Text, calibration: Calibration) -> bool:
    """Calibrate a model that needs it.

    Args:
        model: digital or simulated.
        scored: what it will be used on.
        calibration: how.

    Returns:
        Whether it was done.

    Raises:
        UserError: there is no text to calibrate on.
    """
    if not needs_ranges(model, calibration):
        return False
    text, batches = calibration.text(scored), calibration.num_batches
    if calibration.anew and model.state is not None:
        model.state.reset()
    calibrate(model, text.windows(model), batch_size=text.batch_size, num_batches=batches)
    return True


def set_ranges(model: LanguageModel, scored: Text, calibration: Calibration) -> bool:
    """As `calibrate_for`, and say so."""
    if calibration.anew and not has_ranges(model):
        kind = model.transform.name if model.transform else "digital"
        logger.warning("--recalibrate: the model is %s, and has no ranges to set", kind)
    if not calibrate_for(model, scored, calibration):
        return False
    text = calibration.text(scored)
    logger.warning(
        "%s: ranges set on %d batches of %s",
        calibration.reason,
        calibration.num_batches,
        text.path or f"{text.dataset}'s training part",
    )
    return True


def measure(
    source: str,
    text: Text,
    calibration: Calibration,
    transform: Choice = KEEP_OWN,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The perplexity of a model.

    Args:
        source: torchtitan checkpoint, Hugging Face folder or hub name.
        text: to score.
        calibration: used where a range was never set, or where it asks for all.
        transform: to simulate.
        dtype: of weights and activations.
        trust_remote_code: run Python code that the model or its tokenizer brings.

    Returns:
        source, dataset, transform (None = digital), transform_config, seq_len, dtype, calibrated,
        tokens, nll (nats per token), perplexity.

    Raises:
        UserError: the source, the transform or the text cannot be used.
    """
    model = load_model(source, transform, dtype=dtype, trust_remote_code=trust_remote_code)
    calibrated = set_ranges(model, text, calibration)
    result = perplexity(
        model, text.windows(model), batch_size=text.batch_size, num_batches=text.num_batches
    )
    return {
        "source": source,
        "dataset": text.path or text.dataset,
        "transform": model.transform and model.transform.name,
        "transform_config": transform.source if isinstance(transform, TransformConfig) else None,
        "seq_len": text.seq_len or model.seq_len,
        "dtype": dtype,
        "calibrated": calibrated,
        "tokens": result.tokens,
        "nll": result.nll,
        "perplexity": result.perplexity,
    }


def load_for_generation(
    source: str,
    transform: Choice = KEEP_OWN,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    device: str | None = None,
) -> LanguageModel:
    """A transformers model to sample or to give to lm-eval; unset ranges come from builtin text.

    Args:
        source: torchtitan checkpoint, Hugging Face folder or hub name.
        transform: to simulate.
        dtype: of weights and activations.
        trust_remote_code: run Python code that the model or its tokenizer brings.
        device: to run on; None = the accelerator that is there, else the CPU.

    Raises:
        UserError: the source or the transform cannot be used.
    """
    model = load_model(
        source,
        transform,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device=device,
        for_generation=True,
    )
    set_ranges(model, Text("builtin", None, 8, None, None), Calibration(8, None))
    return model

"""The loss of a model over parameters of its hardware, on the same tokens everywhere."""

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aixsim_cli import __version__
from aixsim_cli.energy.account import light_per_token, token_energy
from aixsim_cli.energy.hardware import Hardware
from aixsim_cli.energy.source import shape_of_source
from aixsim_cli.errors import UserError
from aixsim_cli.eval.kept import Kept, kept_in
from aixsim_cli.eval.measure import Calibration, Text, calibrate_for, needs_ranges
from aixsim_cli.eval.perplexity import Perplexity, perplexity
from aixsim_cli.models.load import LanguageModel, load_model, simulated
from aixsim_cli.run.log import each_once
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.vary import Axis, points_of, said

logger = logging.getLogger("aixsim")


# what is noted of the model would be noted at every point
@each_once()
def sweep(
    source: str,
    axes: Sequence[Axis],
    text: Text,
    calibration: Calibration,
    transform: Choice = KEEP_OWN,
    *,
    repeats: int = 1,
    folder: Path | None = None,
    hardware: Hardware | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate a model at every point of a grid of parameters.

    Noise seed r draws the same noise at every point, as far as the hardware is the same. Seed 0 is
    that of `measure`, which finds the same at a point as here.

    Args:
        source: torchtitan checkpoint, Hugging Face folder or hub name.
        axes: what is varied.
        text: to score.
        calibration: at each point, of the ranges that training did not set, or of all.
        transform: what is varied, and what the model is evaluated under unchanged.
        repeats: noise seeds.
        folder: where each loss is kept as it is found, and those that are there are not measured
            again; None = nowhere.
        hardware: prices of the energy of a token; None = no energy.
        dtype: of weights and activations.
        trust_remote_code: run Python code that the model or its tokenizer brings.

    Returns:
        source, dataset, transform, transform_config, hardware, seq_len, dtype, repeats, tokens;
        `vary`, of each axis its key, name, layers, values, scale and unit; and records, `digital`,
        `own` (the transform unchanged) and a list `points`. Each has values (of the axes, by their
        keys), calibrated, nll (nats per token, the mean over the seeds), nlls, stdev (over the
        seeds, of a sample; None of one), perplexity, delta (nats per token above the digital loss),
        delta_stderr (its standard error over the windows of the text, each compared with itself;
        None of one window), and of the forward of a token in windows as long as these:
        photons_per_token (detected; None = there is no light, or its amount is not said) and, of
        hardware, joules_per_token (low, nominal, high).

    Raises:
        UserError: the source, the transform or the text cannot be used, an axis does not fit, or
            the folder is of another sweep.
    """
    logger.info("loading %s", source)
    base, ranges = _transform_of(source, transform, dtype, trust_remote_code)
    digital = load_model(source, DIGITAL, dtype=dtype, trust_remote_code=trust_remote_code)
    axes, points = points_of(base, axes, digital.sites)
    most = None if text.num_batches is None else text.num_batches * text.batch_size
    windows = list(islice(text.windows(digital), most))
    inputs = _Inputs(digital, ranges, windows, text, calibration)
    plan = [_DIGITAL, _Asked({}, base), *(_Asked(p.values, p.transform) for p in points)]
    configs = [asked.transform for asked in plan]
    inputs.check_calibration(configs)
    seq_len = text.seq_len or digital.seq_len
    costs = _costs(source, configs, hardware, seq_len, trust_remote_code)
    with kept_in(folder, inputs.identity(base, dtype)) as kept:
        tokens, records = _measure(plan, inputs, repeats, kept)
    records = [record | cost for record, cost in zip(records, costs, strict=True)]
    return {
        "source": source,
        "dataset": text.path or text.dataset,
        "transform": base.name,
        "transform_config": transform.source if isinstance(transform, TransformConfig) else None,
        "hardware": hardware and hardware.name,
        "seq_len": seq_len,
        "dtype": dtype,
        "repeats": repeats,
        "tokens": tokens,
        "vary": [asdict(axis) | {"key": axis.key} for axis in axes],
        "digital": records[0],
        "own": records[1],
        "points": records[2:],
    }


class _Asked(NamedTuple):
    """What a loss is of: the values of a point and the transform with them; None = digital."""

    values: Mapping[str, Any] | None
    transform: TransformConfig | None


_DIGITAL = _Asked(None, None)


def _measure(
    plan: Sequence[_Asked], inputs: "_Inputs", repeats: int, kept: Kept
) -> tuple[int, list[dict[str, Any]]]:
    """The tokens that were scored, and a record of each, compared with the first."""
    records: list[dict[str, Any]] = []
    reference: Perplexity | None = None
    for place, asked in enumerate(plan, start=1):
        began = time.monotonic()
        runs, calibrated = inputs.losses(asked, repeats, kept)
        reference = runs[0] if reference is None else reference
        record = {"values": asked.values or {}, "calibrated": calibrated}
        record |= inputs.summary(runs, reference)
        records.append(record)
        logger.info(
            "%d of %d: %s: nll %.5f, %+.5f to digital%s (%.1f s)",
            place,
            len(plan),
            name_of(asked.values),
            record["nll"],
            record["delta"],
            ", ranges set" if calibrated else "",
            time.monotonic() - began,
        )
    assert reference is not None
    return reference.tokens, records


def _costs(
    source: str,
    transforms: Sequence[TransformConfig | None],
    hardware: Hardware | None,
    seq_len: int,
    trust_remote_code: bool,
) -> list[dict[str, Any]]:
    """Light and energy of a token's forward under each of these transforms."""
    if hardware is None and not any(map(_has_light, transforms)):
        # the shape of a model may be one that nobody can count
        return [{"photons_per_token": None}] * len(transforms)
    shape, _ = shape_of_source(source, DIGITAL, trust_remote_code=trust_remote_code)
    costs = []
    for transform in transforms:
        if hardware is None:
            light = light_per_token(shape, transform, seq_len=seq_len)
            costs.append({"photons_per_token": sum(light.values()) if light else None})
            continue
        found = token_energy(shape, transform, hardware, seq_len=seq_len)
        joules = list(found.joules_per_token)
        costs.append({"photons_per_token": found.photons_per_token, "joules_per_token": joules})
    return costs


def _has_light(transform: TransformConfig | None) -> bool:
    rules = [rule for part in transform.transforms for rule in part.rules] if transform else []
    return any(getattr(rule.params, "photons_per_mac", None) is not None for rule in rules)


def _transform_of(
    source: str, choice: Choice, dtype: str, trust_remote_code: bool
) -> tuple[TransformConfig, dict[str, Tensor]]:
    """The transform that is varied, and the ranges that the model has for it."""
    own = load_model(source, choice, dtype=dtype, trust_remote_code=trust_remote_code)
    if own.transform is None:
        raise UserError(
            f"{source}: is digital, and has no parameters to vary; expected --transform-config"
        )
    return own.transform, own.ranges


@dataclass(frozen=True)
class _Inputs:
    """What is the same at every point."""

    digital: LanguageModel
    ranges: Mapping[str, Tensor]
    windows: list[tuple[Tensor, Tensor]]
    text: Text
    calibration: Calibration

    def identity(self, transform: TransformConfig, dtype: str) -> dict[str, Any]:
        """What tells a loss from one of something else, by the names that messages give it."""
        weights = dict(self.digital.module.named_parameters()) | dict(self.ranges)
        return {
            "model (its weights or ranges)": _digest(weights.values()),
            "transform": dict(transform.mapping),
            "text (by its tokens)": _digest(part for window in self.windows for part in window),
            "--batch-size": self.text.batch_size,
            "--dtype": dtype,
            "calibration": asdict(self.calibration),
            "device": next(self.digital.module.parameters()).device.type,
            "version of aixsim": __version__,
            "version of torch": torch.__version__,
        }

    def check_calibration(self, transforms: Iterable[TransformConfig | None]) -> None:
        """Refuse now, and not at its point, a calibration that has no text to be made on."""
        if self.text.dataset != "local" or self.calibration.path is not None:
            return
        for transform in filter(None, transforms):
            model = simulated(self.digital, transform, self.ranges)
            if needs_ranges(model, self.calibration):
                self.calibration.text(self.text)

    def losses(self, asked: _Asked, repeats: int, kept: Kept) -> tuple[list[Perplexity], bool]:
        """The loss of every noise seed, measured where it is not kept; whether ranges were set."""
        values, transform = asked
        found = [kept.get(values, seed) for seed in range(1 if transform is None else repeats)]
        missing = [seed for seed, loss in enumerate(found) if loss is None]
        calibrated, model = False, self.digital
        if transform is not None:
            model = simulated(self.digital, transform, self.ranges)
            calibrated = needs_ranges(model, self.calibration)
        if missing and calibrated:
            calibrate_for(model, self.text, self.calibration)
        for seed in missing:
            found[seed] = loss = perplexity(
                model,
                self.windows,
                batch_size=self.text.batch_size,
                num_batches=self.text.num_batches,
                noise_seed=seed,
            )
            kept.add(values, seed, loss)
        return [loss for loss in found if loss is not None], calibrated

    def summary(self, runs: Sequence[Perplexity], digital: Perplexity) -> dict[str, Any]:
        """The losses of the noise seeds of a point in a few numbers."""
        nlls = [run.nll for run in runs]
        nll = math.fsum(nlls) / len(nlls)
        squares = math.fsum((value - nll) ** 2 for value in nlls)
        return {
            "nll": nll,
            "nlls": nlls,
            "stdev": math.sqrt(squares / (len(nlls) - 1)) if len(nlls) > 1 else None,
            "perplexity": Perplexity(digital.tokens, nll).perplexity,
            "delta": nll - digital.nll,
            "delta_stderr": self._error(runs, digital),
        }

    def _error(self, runs: Sequence[Perplexity], digital: Perplexity) -> float | None:
        """The standard error of a mean over tokens, whose windows are what was sampled."""
        count = len(digital.windows)
        if count < 2:
            return None
        lengths = _float64([len(labels) for _, labels in self.windows[:count]])
        nats = _float64([run.windows for run in runs]).mean(0)
        above = nats - _float64(digital.windows)
        # of a ratio of two sums, nats over tokens
        residuals = above - lengths * (above.sum() / lengths.sum())
        variance = count / (count - 1) * residuals.square().sum() / lengths.sum() ** 2
        return variance.sqrt().item()


def _float64(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(str((plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def name_of(values: Mapping[str, Any] | None) -> str:
    """What a loss is of, as a table and messages say it."""
    return "digital" if values is None else said(values) or "as it is"

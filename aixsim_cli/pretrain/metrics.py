"""What a run shows and records: torchtitan's metrics plus a progress line and `metrics.jsonl`."""

import json
import logging
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    WandBLogger,
)
from torchtitan.distributed import ParallelDims

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.errors import UserError
from aixsim_cli.run.replace import set_aside

logger = logging.getLogger("aixsim")

METRICS_FILE = "metrics.jsonl"


class MetricsFile(BaseLogger):
    """One JSON object a line.

    Args:
        path: appended to by a run that goes on; a last line that a kill or a full disk has cut is
            ended first. One that begins sets aside what is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Append a record; NaN is written as NaN, never as 0."""
        if step == 1 and not self.began and self.path.is_file() and self.path.stat().st_size:
            # the records of a run are one curve
            moved = set_aside(self.path, self.path.with_suffix(".set-aside"))
            logger.warning("%s: of a run before this one; set aside as %s", self.path, moved)
        self.began = True
        line = json.dumps(metrics) + "\n"
        with self.path.open("ab+") as file:
            if file.seekable() and file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(line.encode())


class Sturdy(BaseLogger):
    """A logger whose failures are told once, and cost records but never the training.

    Args:
        inner: the logger.
        path: where it writes, for messages.
    """

    def __init__(self, inner: BaseLogger, path: Path) -> None:
        self.inner, self.path = inner, path
        self.lost = 0  # records since the last one that was written

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record a step, or say that it cannot be."""
        try:
            self.inner.log(metrics, step)
        except Exception as error:  # disks, networks, and what W&B and TensorBoard make of them
            if not self.lost:
                said = "%s: step %d could not be recorded: %s; the run goes on, and tries again"
                logger.warning(said, self.path, step, _reason(error))
            self.lost += 1
            return
        if self.lost:
            logger.warning("%s: recorded again; %d records are lost", self.path, self.lost)
            self.lost = 0

    def close(self) -> None:
        """End; what it has buffered may be lost."""
        if self.lost:
            logger.warning("%s: the last %d records are lost", self.path, self.lost)
        try:
            self.inner.close()
        except Exception as error:
            logger.warning("%s: could not be closed: %s", self.path, _reason(error))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


class RunMetrics(MetricsProcessor):
    """torchtitan's processor (W&B, TensorBoard), with a line or a bar for people and a file.

    `metrics.jsonl` in the dump folder gets one JSON object per logged step: step, loss, grad_norm,
    lr, tokens, tokens_per_second, seconds, and what the transform reports. A resumed run appends;
    of two records of a step the later one holds.
    """

    def __init__(self, job_config: PretrainConfig, parallel_dims: ParallelDims) -> None:
        super().__init__(job_config, parallel_dims)
        self.folder = Path(job_config.job.dump_folder)
        kept = self.logger._loggers if isinstance(self.logger, LoggerContainer) else None
        started = kept is None or any(isinstance(one, WandBLogger) for one in kept)
        if job_config.metrics.enable_wandb and not started:
            # torchtitan logs the failure and trains on without
            raise UserError(
                "metrics.enable_wandb: got true, but W&B did not start (its reason is above); "
                "expected `wandb login`, WANDB_MODE=offline in the environment, or false"
            )
        self.is_main = torch.distributed.get_rank() == 0
        self.total_steps = job_config.training.steps
        self.logger = Sturdy(self.logger, self.folder / job_config.metrics.save_tb_folder)
        self.file = Sturdy(MetricsFile(self.folder / METRICS_FILE), self.folder / METRICS_FILE)
        self.started = time.perf_counter()
        self.last_step: int | None = None
        self.is_left_out = False  # the step at hand: it came to nothing
        self.progress = _progress_bar(self.total_steps) if self.is_main else None

    def should_log(self, step: int) -> bool:
        """Every `log_freq` steps, the first and the last; none that was given up."""
        if self.is_left_out:
            return False
        return super().should_log(step) or step == self.total_steps

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Record a step; called by the trainer on every rank.

        Args:
            step: from 1.
            global_avg_loss: nats per token, over all ranks.
            global_max_loss: the largest rank's.
            grad_norm: before clipping.
            extra_metrics: torchtitan's `lr` and `n_tokens_seen`.
        """
        extra = (extra_metrics or {}) | self._transform_metrics()
        now = time.perf_counter()
        elapsed = now - self.time_last_log
        rate = self.ntokens_since_last_log * self._data_ranks() / elapsed
        # the parent logs to W&B and TensorBoard, and resets the counters read above
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)
        if not self.is_main:
            return
        record = {
            "step": step,
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            "lr": extra.pop("lr"),
            "tokens": int(extra.pop("n_tokens_seen")),
            "tokens_per_second": round(rate, 1),
            "seconds": round(now - self.started, 3),
            **extra,
        }
        self.file.log(record, step)
        self._show(record, elapsed)
        self.last_step = step

    def _transform_metrics(self) -> dict[str, float]:
        state = getattr((self.model_parts or [None])[0], "transform_state", None)
        if state is None:
            return {}
        return state.metrics()

    def _data_ranks(self) -> int:
        dims = self.parallel_dims
        return dims.dp_replicate * dims.dp_shard

    def _show(self, record: dict[str, Any], elapsed: float) -> None:
        step = record["step"]
        text = (
            f"loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        )
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step, description=text)
            return
        # by the latest steps alone: the first may have compiled
        # a run that was rolled back has shown this step before
        done = max(1, step - self.last_step) if self.last_step is not None else 1
        remaining = timedelta(seconds=math.ceil((self.total_steps - step) * elapsed / done))
        logger.info("step %d/%d  %s  %s left", step, self.total_steps, text, remaining)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        self.file.close()
        super().close()


def build_metrics_processor(
    job_config: PretrainConfig, parallel_dims: ParallelDims, model_args: Any = None
) -> RunMetrics:
    """torchtitan's hook for a metrics processor."""
    return RunMetrics(job_config, parallel_dims)


def _progress_bar(total: int) -> Progress | None:
    if not sys.stderr.isatty():
        return None
    progress = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    progress.add_task("starting", total=total)
    progress.start()
    return progress

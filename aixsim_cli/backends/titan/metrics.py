"""What a run shows and records: torchtitan's metrics plus a progress line and `metrics.jsonl`."""

import json
import logging
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchtitan.components.metrics import LoggerContainer, MetricsProcessor, WandBLogger
from torchtitan.distributed import ParallelDims

from aixsim_cli.backends.titan.schema import PretrainConfig
from aixsim_cli.errors import UserError

logger = logging.getLogger("aixsim")

METRICS_FILE = "metrics.jsonl"


class RunMetrics(MetricsProcessor):
    """torchtitan's processor (W&B, TensorBoard), with a line or a bar for people and a file.

    `metrics.jsonl` in the dump folder gets one JSON object per logged step: step, loss, grad_norm,
    lr, tokens, tokens_per_second, seconds, and what the transform reports. A resumed run appends;
    of two records of a step the later one holds.
    """

    def __init__(self, job_config: PretrainConfig, parallel_dims: ParallelDims) -> None:
        super().__init__(job_config, parallel_dims)
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
        self.path = Path(job_config.job.dump_folder) / METRICS_FILE
        self.started = time.perf_counter()
        self.last_step: int | None = None
        self.progress = _progress_bar(self.total_steps) if self.is_main else None

    def should_log(self, step: int) -> bool:
        """Every `log_freq` steps, the first and the last."""
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
        _append(self.path, record)
        self._show(record, elapsed)
        self.last_step = step

    def _transform_metrics(self) -> dict[str, float]:
        state = getattr((self.model_parts or [None])[0], "transform_state", None)
        if state is None:
            return {}
        return {name: value.item() for name, value in state.metrics().items()}

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
        super().close()


def build_metrics_processor(
    job_config: PretrainConfig, parallel_dims: ParallelDims, model_args: Any = None
) -> RunMetrics:
    """torchtitan's hook for a metrics processor."""
    return RunMetrics(job_config, parallel_dims)


def _append(path: Path, record: dict[str, Any]) -> None:
    # NaN is written as NaN, never as 0: Python's json does so by default
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


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

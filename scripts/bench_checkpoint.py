"""How long a save keeps the training waiting, with torch's writer and ours, and in the background.

    python scripts/bench_checkpoint.py --flavor 60M --saves 5

Trains a few short steps of a digital model on the built-in text, saving after every one, and prints
the seconds that each call of `save` took, without the first.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

from torch.distributed.checkpoint import FileSystemWriter

from aixsim_cli.config.budget import fit_to_budget
from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.config.recipe import follow
from aixsim_cli.pretrain import checkpointer, launch

AsyncMode = Literal["disabled", "async", "async_with_pinned_mem"]
# what is timed -> the mode it is saved in
KINDS: dict[str, AsyncMode] = {
    "plain": "disabled",
    "manifest": "disabled",
    "async": "async",
    "async_with_pinned_mem": "async_with_pinned_mem",
}


def seconds_of_saves(flavor: str, saves: int, async_mode: AsyncMode) -> list[float]:
    """Seconds of each save but the first.

    Args:
        flavor: of the architecture aixsim.
        saves: how many to time.
        async_mode: of `checkpoint.async_mode`.
    """
    config = follow(PretrainConfig())
    config.model.flavor, config.model.hf_assets_path = flavor, "builtin"
    config.training.dataset = "builtin"
    config.training.local_batch_size, config.training.seq_len = 1, 64
    config.training.mixed_precision_param = "float32"
    config.checkpoint.keep_latest_k = 2
    config.checkpoint.interval, config.checkpoint.async_mode = 1, async_mode
    fit_to_budget(config, token_num_scale=1, steps=saves + 2)
    times: list[float] = []
    save = checkpointer.Checkpointer.save

    def timed(self, curr_step: int, last_step: bool = False) -> None:
        self.wait()  # one save at a time: what is measured is not the one before
        begin = time.perf_counter()
        save(self, curr_step, last_step)
        times.append(time.perf_counter() - begin)

    with tempfile.TemporaryDirectory(dir=os.environ.get("AIXSIM_BENCH_DIR")) as folder:
        config.job.dump_folder = str(Path(folder) / "run")
        checkpointer.Checkpointer.save = timed
        try:
            launch.run(config)
        finally:
            checkpointer.Checkpointer.save = save
    # the first one warms up; the last one is never in the background
    return times[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that a save keeps the training waiting.")
    parser.add_argument("--flavor", default="60M")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, required=True)
    options = parser.parse_args()
    if options.kind == "plain":
        checkpointer.CheckpointWriter = FileSystemWriter  # pyright: ignore[reportAttributeAccessIssue]
    times = seconds_of_saves(options.flavor, options.saves, KINDS[options.kind])
    shown = " ".join(f"{seconds:.3f}" for seconds in times)
    print(f"{options.kind}: median {statistics.median(times):.3f} s of {shown}")


if __name__ == "__main__":
    main()

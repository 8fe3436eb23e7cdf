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

from torch.distributed.checkpoint import FileSystemWriter

from aixsim_cli.config.generate import Request, make_config, make_plan
from aixsim_cli.config.pretrain import build_config
from aixsim_cli.pretrain import checkpointer, launch
from aixsim_cli.settings.load import Document


def seconds_of_saves(flavor: str, saves: int, async_mode: str) -> list[float]:
    """Seconds of each save but the first.

    Args:
        flavor: of the architecture aixsim.
        saves: how many to time.
        async_mode: of `checkpoint.async_mode`.
    """
    request = Request(
        model_flavor=flavor,
        tokenizer_path="builtin",
        dataset="builtin",
        batch_size=1,
        seq_len=64,
        steps=saves + 2,
        mixed_precision_param="float32",
        keep_last_k_ckpts=2,
    )
    values = make_config(request, make_plan(request))
    values["checkpoint"] |= {"interval": 1, "async_mode": async_mode}
    times: list[float] = []
    save = checkpointer.Checkpointer.save

    def timed(self, curr_step: int, last_step: bool = False) -> None:
        self.wait()  # one save at a time: what is measured is not the one before
        begin = time.perf_counter()
        save(self, curr_step, last_step)
        times.append(time.perf_counter() - begin)

    with tempfile.TemporaryDirectory(dir=os.environ.get("AIXSIM_BENCH_DIR")) as folder:
        values["job"]["dump_folder"] = str(Path(folder) / "run")
        checkpointer.Checkpointer.save = timed
        try:
            launch.run(build_config(Document(values, "bench")))
        finally:
            checkpointer.Checkpointer.save = save
    # the first one warms up; the last one is never in the background
    return times[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that a save keeps the training waiting.")
    parser.add_argument("--flavor", default="60M")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument(
        "--kind", choices=["plain", "manifest", "async", "async_with_pinned_mem"], required=True
    )
    options = parser.parse_args()
    if options.kind == "plain":
        checkpointer.CheckpointWriter = FileSystemWriter  # pyright: ignore[reportAttributeAccessIssue]
    mode = options.kind if options.kind.startswith("async") else "disabled"
    times = seconds_of_saves(options.flavor, options.saves, mode)
    shown = " ".join(f"{seconds:.3f}" for seconds in times)
    print(f"{options.kind}: median {statistics.median(times):.3f} s of {shown}")


if __name__ == "__main__":
    main()

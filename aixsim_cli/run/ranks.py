"""What the ranks of a run tell each other; alone where there is one."""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_main() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def several() -> bool:
    """Whether there are ranks to wait for."""
    return dist.is_initialized() and dist.get_world_size() > 1


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank: the others may see a shared folder a little later."""
    if not several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def true_on_all(flag: Tensor) -> bool:
    """Whether a flag, () bool on the device of the run, is true on every rank."""
    if not several():
        return bool(flag.item())
    flag = flag.to(torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


class Agreement:
    """What all ranks act on in the same step: flags of each, by one all-reduce.

    On the host, whatever the device: a flag must not wait for the accelerator's queue.

    Args:
        timeout: how long ranks wait for each other; None = torch's default.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if several() else None

    def of(self, *flags: int) -> list[int]:
        """The largest value of each flag on any rank, the same on all of them."""
        if self._group is None:
            return [int(flag) for flag in flags]
        values = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def meet(self) -> None:
        """Return when all ranks are here."""
        if self._group is not None:
            dist.barrier(self._group)


def answering(seconds: float) -> list[int]:
    """The ranks that call this within some seconds of each other, after a collective has failed.

    They meet in the store that they found each other by, which no collective can block.

    Raises:
        RuntimeError: the store does not answer: it lives in rank 0, or in the launcher.
    """
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=seconds))
    keys = [f"aixsim/answers/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "1")
    end = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.1)
    return [rank for rank, key in enumerate(keys) if store.check([key])]

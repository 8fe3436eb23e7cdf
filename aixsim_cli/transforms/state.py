"""The state of a transformed model: what its modules measure, and the noise they draw.

The forward of a simulated module is a pure function of its inputs, weights, ranges and noise key.
It only records what it saw; `TransformState.end_step` turns the records of all modules and ranks
into new ranges, once an optimizer step. Every buffer here is updated in place: trainers cache the
state dict, and a rebound buffer would be saved stale.
"""

import hashlib
import logging
import struct
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from aixsim_kernels import (
    are_known_set,
    clipped_in,
    empty_ranges,
    empty_seen,
    is_empty,
    note_set,
    observed_in,
    update_ranges,
)
from torch import Tensor, nn

from aixsim_cli.transforms.calls import Calls, noise_key
from aixsim_cli.transforms.lamp import Lamp, keep_float32
from aixsim_cli.transforms.protocol import Lora, Site
from aixsim_cli.transforms.ranges import DEFAULT, attack_release
from aixsim_cli.transforms.watch import StepWatch

logger = logging.getLogger("aixsim")

# begins the names of metrics that tell which share of a tensor is clipped
CLIPPED = "clipped_"
# share of a weight's elements that a sound training never clips
MOST_OF_A_WEIGHT = 0.05
# threads may call one model
_counting = threading.Lock()


def noise_stream(seed: int, name: str) -> int:
    """A signed 64-bit number that tells the noise of one module from that of all others.

    Args:
        seed: the transform's.
        name: the module's Hugging Face name.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return struct.unpack("<q", digest)[0]


class SimulatedModule(nn.Module):
    """Every module that simulates hardware: its parameters, ranges, their record, and noise.

    A paradigm derives from `SimulatedLinear` or `SimulatedAttention`, and says in its class what
    differs from the defaults here.

    Class data:
        seed_field: the paradigm's parameter that seeds the noise; without one the seed is 0.
        quantises: what the module quantises with a running range, by the names that the log gives
            it ("x", "w", "y"). `q_smooth_factor` of the parameters, if any, is their rule.
        logs_clipped: whether the log shows the shares that are clipped.

    Buffers:
        ranges: float32 (n, 2), lo and hi of each quantised tensor; (+inf, -inf) = not yet set.
            Part of the state dict, where there are any.
        seen: float32 (n, 3), what training calls saw: the extremes since the last optimizer step,
            the largest shares that lay beyond the ranges since they were last logged; those of
            lamps come last. Not saved.
        noise_stream: int64 scalar, what tells its noise from that of other modules. Not saved.
    """

    seed_field: ClassVar[str] = "seed"
    quantises: ClassVar[tuple[str, ...]] = ()
    logs_clipped: ClassVar[bool] = False
    # a linear whose parameter is (K, N), as a file has it, under a class that shows it as (N, K)
    stores_transposed: bool = False

    params: Any
    ranges: Tensor
    seen: Tensor
    noise_stream: Tensor

    def lamps(self) -> int:
        """How many lamps these parameters ask for."""
        return 0

    def lamp_name(self) -> str:
        """What its lamps are saved as: another name where light means something else."""
        return "lamp"

    @property
    def lamp(self) -> Lamp | None:
        """See there; None where no parameter asks for one."""
        lamp = self._modules.get(self.lamp_name())
        return lamp if isinstance(lamp, Lamp) else None

    def simulate(self, params: Any, name: str, kind: str, device: torch.device) -> None:
        """Take the parameters and create the buffers.

        Args:
            params: the paradigm's.
            name: of the place, the same in every library of models; its noise is keyed by it.
            kind: what the log calls modules like this one.
            device: where the module's parameters are; may be meta.
        """
        self.params = params
        self.smooth = getattr(params, "q_smooth_factor", DEFAULT)
        self.kind = kind
        self.stream = stream = noise_stream(getattr(params, self.seed_field, 0), name)
        n_ranges, n_lamps = len(self.quantises), self.lamps()
        self.register_buffer(
            "ranges", empty_ranges(n_ranges, device=device), persistent=n_ranges > 0
        )
        if n_lamps:
            # not by `add_module`, which takes a property for something that is there
            self._modules[self.lamp_name()] = Lamp(n_lamps, device)
        seen = empty_seen(n_ranges + n_lamps, device=device)
        self.register_buffer("seen", seen, persistent=False)
        self.register_buffer(
            "noise_stream",
            torch.full((), stream, dtype=torch.int64, device=device),
            persistent=False,
        )
        # the model's, once it is part of one
        self.calls = Calls()

    @property
    def noise_key(self) -> Tensor:
        """Selects the noise of this call of the model, also where the call is recomputed.

        int64, 0-d, on the module's device, a tensor of its own every time.
        """
        return noise_key(self.noise_stream, self.calls)

    def range_buffers(self) -> dict[str, Tensor]:
        """Name within the module -> ranges, float32 (n, 2): its own and, if any, its lamp's."""
        own = {"ranges": self.ranges} if len(self.ranges) else {}
        lamp = self.lamp
        return own if lamp is None else own | {f"{self.lamp_name()}.ranges": lamp.ranges}

    def all_ranges(self) -> Tensor:
        """`ranges`, and the lamp's behind: float32 (n, 2)."""
        if self.lamp is None:
            return self.ranges
        buffers = self.range_buffers().values()
        ranges = torch.cat(list(buffers))
        # what is traced has no versions
        if not torch.compiler.is_compiling() and all(map(are_known_set, buffers)):
            note_set(ranges)
        return ranges

    @torch.no_grad()
    def reset_state(self) -> None:
        """Back to the start: no range set, nothing observed. Needed after `to_empty`."""
        for ranges in self.range_buffers().values():
            ranges.copy_(empty_ranges(len(ranges), device=ranges.device))
        self.reset_record()

    @torch.no_grad()
    def reset_record(self) -> None:
        """Forget what was observed; the ranges stay."""
        self.seen.copy_(empty_seen(len(self.seen), device=self.seen.device))
        self.noise_stream.fill_(self.stream)

    def record(self, seen: Tensor) -> None:
        """Note what a call saw, float32 (n, 3), as `seen_of` makes it; in evaluation nothing."""
        if self.training:
            with torch.no_grad():
                # the larger of both, in place and in one kernel
                self.seen.clamp_(min=seen)

    def metrics(self) -> dict[str, Tensor]:
        """What the training log shows of this module: name -> float32 0-d, a view."""
        if not self.logs_clipped:
            return {}
        # without those of lamps, which clip nothing
        shares = zip(self.quantises, clipped_in(self.seen).unbind(), strict=False)
        return {f"{CLIPPED}{name}/{self.kind}": share for name, share in shares}

    def photons_per_token(self) -> Tensor | None:
        """Photons that its detectors counted for a token lately, float32 0-d; None = no light."""
        return None

    def asks_to_clip(self) -> float:
        """The share of a weight that its range is meant to clip."""
        return 0.0

    def clipped_weight(self) -> Tensor | None:
        """Which share of the weight was clipped unasked: float32 0-d; None = it has no range."""
        if "w" not in self.quantises:
            return None
        return clipped_in(self.seen)[self.quantises.index("w")] - self.asks_to_clip()

    def _apply(self, fn, recurse=True):  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._apply(fn, recurse)
        keep_float32(self, ("ranges", "seen"))
        return self


class SimulatedLinear(SimulatedModule, nn.Linear):
    """A linear layer on simulated hardware: a paradigm adds its `forward`.

    It subclasses `nn.Linear` and has the very parameters of the layer that it replaces, so that
    state-dict names, sharding plans and optimizers do not notice.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, params: Any, site: Site) -> Self:
        """Take the place of `linear`, weight (N, K)."""
        module = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        module.weight, module.bias = linear.weight, linear.bias
        kind = site.hf_name.rpartition(".")[2]
        module.simulate(params, site.hf_name, kind, linear.weight.device)
        return module


class SimulatedAttention(SimulatedModule):
    """The two products of an attention on simulated hardware: a paradigm adds its `forward`."""

    def __init__(self, params: Any, site: Site) -> None:
        super().__init__()
        self.simulate(params, f"{site.hf_name}.attention", "attention", torch.device("cpu"))


class TransformState:
    """All simulated modules of one model, updated together.

    Args:
        modules: name in the model -> simulated module.
        lora: name of a simulated linear -> the low-rank update that its config asks for.
    """

    def __init__(
        self, modules: dict[str, SimulatedModule], lora: Mapping[str, Lora] | None = None
    ) -> None:
        self.modules = modules
        self.lora = dict(lora or {})
        self.step = self.rank = self.call = 0
        self.watch = StepWatch(any(module.range_buffers() for module in modules.values()))
        # weights of the old ranges (n, 2), of ends that grow and that shrink
        self._smooth: Tensor | None = None
        self._told_of_clipping = False
        self._made, self.calls = 0, Calls()  # calls made in this process, and the present one
        for module in modules.values():
            module.calls = self.calls

    def reset(self) -> None:
        """Reset every module: ranges unset, nothing observed."""
        for module in self.modules.values():
            module.reset_state()

    def reset_records(self) -> None:
        """Forget what all modules observed; the ranges stay: of a step that is left out."""
        for module in self.modules.values():
            module.reset_record()

    def begin_step(self, step: int, rank: int = 0) -> None:
        """Set the noise counters for an optimizer step.

        Args:
            step: the trainer's step; the same step draws the same noise after a resume.
            rank: this rank's place among those that see different data.
        """
        self.step, self.rank, self.call = step, rank, 0

    def next_call(self) -> None:
        """Begin a call: new noise for every module, by a hash of (step, call, rank).

        Raises:
            RunError: the whole model is recomputed, and nothing tells which call it was.
        """
        with _counting:
            counters = struct.pack("<qqq", self.step, self.call, self.rank)
            digest = hashlib.blake2b(counters, digest_size=8).digest()
            begun = self.calls.begin(struct.unpack("<q", digest)[0])
            self.call += begun
            self._made += begun
        # calls 1, 2, 4, 8 …: a look waits for the device
        if begun and self._made & (self._made - 1) == 0:
            self._look_at_ranges()

    def _look_at_ranges(self) -> None:
        """Tell the kernels which modules' ranges are all set; these go on being so."""
        # nothing can be asked where tensors have no values, or a CUDA graph is recorded
        records = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if records or torch._C._len_torch_dispatch_stack():
            return
        for module in self.modules.values():
            for ranges in module.range_buffers().values():
                unknown = not ranges.is_meta and not are_known_set(ranges)
                if unknown and not is_empty(ranges).any():
                    note_set(ranges)

    @torch.no_grad()
    def end_step(self) -> None:
        """Move all ranges towards what all ranks observed in this step, by one all-reduce.

        By the rule of `ranges.py`; a tensor that was not observed keeps its range.
        """
        self.watch.moved()
        modules = [m for m in self.modules.values() if m.range_buffers()]
        if not modules:
            return
        buffers = [(m, ranges) for m in modules for ranges in m.range_buffers().values()]
        of_all = seen = torch.cat([m.seen for m in modules])
        if dist.is_initialized() and dist.get_world_size() > 1:
            of_all = seen.clone()
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
        observed = observed_in(of_all)
        if self._smooth is None or self._smooth.device != observed.device:
            # once: a copy from the host is a wait for the device
            smooth = [_rule(m, ranges) for m, ranges in buffers for _ in range(len(ranges))]
            self._smooth = torch.tensor(smooth, device=observed.device)
        # where ends grow no slower than they shrink, none overtakes the other
        still_set = [
            ranges
            for m, ranges in buffers
            if are_known_set(ranges) and (rule := _rule(m, ranges))[0] <= rule[1]
        ]
        running = [ranges for _, ranges in buffers]
        updated = update_ranges(torch.cat(running), observed, *self._smooth.split(1, 1))
        # each in one kernel on a GPU
        torch._foreach_copy_(running, list(updated.split([len(ranges) for ranges in running])))
        for one in still_set:
            note_set(one)
        # the shares stay until they are logged
        seen[:, :2].fill_(-float("inf"))
        parts = [m.seen for m in modules]
        torch._foreach_copy_(parts, list(seen.split([len(part) for part in parts])))

    def metrics(self) -> dict[str, float]:
        """Scalars worth logging, averaged over the modules that report them, as of the last log.

        Photons are those of all modules. Begins anew what is collected between logs. Warns, once,
        where a good part of a weight was clipped.
        """
        reported: dict[str, list[Tensor]] = {}
        for module in self.modules.values():
            for name, value in module.metrics().items():
                reported.setdefault(name, []).append(value)
        if not reported:
            return {}
        lit = [module.photons_per_token() for module in self.modules.values()]
        if photons := [own for own in lit if own is not None]:
            reported["photons_per_token"] = [torch.stack(photons).sum()]
        self._tell_of_clipping()
        # all at once: each look at a value is a wait for the device
        means = torch.stack([torch.stack(values).mean() for values in reported.values()])
        for module in self.modules.values():
            clipped_in(module.seen).zero_()
        # shares to a millionth: there are many of them in a record
        return {
            name: round(mean, 6) if name.startswith(CLIPPED) else mean
            for name, mean in zip(reported, means.tolist(), strict=True)
        }

    def _tell_of_clipping(self) -> None:
        if self._told_of_clipping or (dist.is_initialized() and dist.get_rank() > 0):
            return
        found = {name: module.clipped_weight() for name, module in self.modules.items()}
        known = {name: share for name, share in found.items() if share is not None}
        if not known:
            return
        shares = dict(zip(known, torch.stack(list(known.values())).tolist(), strict=True))
        worst = max(shares, key=shares.__getitem__)
        if shares[worst] <= MOST_OF_A_WEIGHT:
            return
        self._told_of_clipping = True
        grows_slowly = attack_release(self.modules[worst].smooth)[0] > 0
        logger.warning(
            "%s: %.1f %% of its weight lies beyond the range and is clipped; %d of %d layers clip "
            "more than %.0f %%; expected %sa smaller learning rate",
            worst,
            100 * shares[worst],
            sum(share > MOST_OF_A_WEIGHT for share in shares.values()),
            len(shares),
            100 * MOST_OF_A_WEIGHT,
            f"ranges that grow at once (q_smooth_factor: {[*attack_release(DEFAULT)]}), or "
            if grows_slowly
            else "",
        )


def state_of(model: nn.Module) -> TransformState | None:
    """The state of a simulated model; None for a digital one."""
    return getattr(model, "transform_state", None)


def _rule(module: SimulatedModule, ranges: Tensor) -> tuple[float, float]:
    """By which ranges of a module move; a lamp's mean is smoothed alike up and down."""
    attack, release = attack_release(module.smooth)
    return (attack, release) if ranges is module.ranges else (release, release)

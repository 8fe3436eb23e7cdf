"""What optical operations on a CPU are made of in C: `passes.c` and `attention.c`.

Between two passes a range is a few Python floats: a call of torch for each of its numbers took as
long as a small layer.
"""

import ctypes
import math
from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from aixsim_kernels.common.library import library, matrix_product
from aixsim_kernels.common.noise import normal_table, place_in
from aixsim_kernels.optical.attention.scores import Scores
from aixsim_kernels.optical.light import Lamp, Lit
from aixsim_kernels.optical.passes import Attended, Passes, Range

_NOTHING = (math.inf, -math.inf)


class _Grid(Structure):
    _fields_ = [(name, c_float) for name in ("lo", "hi", "step", "per_level", "top")]


class _Seen(Structure):
    _fields_ = [(name, c_double) for name in ("lowest", "highest", "clipped")]


class _Lit(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("normal", "row", "column", "whole")),
        *((name, c_float) for name in ("electron", "of_reads")),
        ("is_offset", c_int),
    ]


class _Attention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "noise", "mask", "sgemm")),
        *((name, c_long) for name in ("batches", "groups", "repeats", "queries", "keys")),
        *((name, c_long) for name in ("width", "out_width", "later")),
        ("strides", c_long * 4),
        *((name, c_int) for name in ("is_bool", "is_causal", "rowmax", "threads")),
        *((name, c_float) for name in ("shut", "scale", "top")),
        ("grid", _Grid),
    ]


def passes_of(x: Tensor) -> Passes:
    """Who makes the passes of an operation on `x`."""
    found = library() if x.device.type == "cpu" else None
    return NativePasses(found) if isinstance(found, ctypes.CDLL) else Passes()


class NativeRange(Range):
    """A range as C has it: `levels_at` and `seen` are structures, whose numbers are float32."""

    def __init__(self, running: Tensor, ends: Sequence[float], levels: int) -> None:
        self.running, self.levels, self.own = running, levels, None
        self.seen, self.levels_at = _Seen(*_NOTHING, 0), _grid(ends, levels)

    @property
    def bounds(self) -> Tensor:
        return torch.tensor([self.levels_at.lo, self.levels_at.hi], dtype=torch.float32)

    def is_set(self) -> bool:
        return self.levels_at.lo <= self.levels_at.hi

    def take(self, own: Tensor) -> None:
        self.own = own.tolist()
        if not self.is_set():
            self.levels_at = _grid(self.own, self.levels)

    def ends(self) -> Sequence[float]:
        """The batch's own range; the empty one where an end is not finite."""
        found = (self.seen.lowest, self.seen.highest)
        return self.own or (found if all(map(math.isfinite, found)) else _NOTHING)

    def share(self, n: float) -> float:
        """Clipped ones of `n`; at most 1, which queries of NaN, that attend to nothing, are."""
        if not self.is_set():
            return 0.0
        return min(self.seen.clipped / n, 1.0) if n else float(self.seen.clipped > 0)


class NativePasses(Passes):
    """In C, on tensors of a CPU: the same levels, and the same sums on any number of threads."""

    def __init__(self, found: ctypes.CDLL, threads: int | None = None) -> None:
        self._c, self._threads = found, threads or torch.get_num_threads()

    def ranges(self, running: Tensor, levels: Sequence[int]) -> Sequence[NativeRange]:
        each = zip(running, running.tolist(), levels, strict=True)
        return [NativeRange(one, ends, own) for one, ends, own in each]

    def results(
        self, ranges: Sequence[Range], sizes: Sequence[int | Tensor]
    ) -> tuple[Tensor, Tensor]:
        seen, used = [], []
        for one, size in zip(ranges, sizes, strict=True):
            assert isinstance(one, NativeRange)
            lowest, highest = one.ends()
            seen.append((-lowest, highest, one.share(float(size))))
            used.append((one.levels_at.lo, one.levels_at.hi))
        return torch.tensor(seen, dtype=torch.float32), torch.tensor(used, dtype=torch.float32)

    def row_keys(self, shape: Sequence[int], key: Tensor, seed: int) -> Tensor:
        if place_in(key) is not None:
            return super().row_keys(shape, key, seed)
        keys = torch.empty(*shape, dtype=torch.int32)
        self._c.aixsim_row_keys(keys.numel(), int(key), seed, _at(keys))
        return keys

    def modulate(
        self,
        x: Tensor,
        at: Range,
        lut_min: float = 0.0,
        codes: Tensor | None = None,
        inside: Tensor | None = None,
    ) -> Tensor:
        x = x.float().contiguous()
        value = torch.empty_like(x)
        levels, seen = _of(at)
        self._c.aixsim_modulate(
            _at(x), _at(value), _at(codes), _wide(codes), _at(inside), x.numel(), lut_min, levels,
            seen, self._threads,
        )  # fmt: skip
        return value

    def decode(self, codes: Tensor, at: Range) -> Tensor:
        codes = codes.contiguous()
        value = torch.empty(codes.shape, dtype=torch.float32)
        self._c.aixsim_decode(
            _at(codes), _wide(codes), _at(value), value.numel(), _of(at)[0], self._threads
        )
        return value

    def mask_clipped_(self, grad: Tensor, x: Tensor, at: Range) -> Tensor:
        x = x.float().contiguous()
        self._c.aixsim_mask_range(_at(grad), _at(x), x.numel(), _of(at)[0], self._threads)
        return grad

    def mask_packed_(self, grad: Tensor, inside: Tensor) -> Tensor:
        self._c.aixsim_mask_packed(_at(grad), _at(inside), grad.numel(), self._threads)
        return grad

    def detect_(
        self,
        acc: Tensor,
        at: Range,
        keys: Tensor | None,
        *,
        first: Tensor | int = 0,
        by_row: bool = False,
        lit: Lit | None = None,
    ) -> None:
        columns = acc.shape[-1]
        levels, seen = _of(at)
        light = None
        if lit is not None:
            held = normal_table(acc.device), lit.row, lit.column, lit.whole
            electron = float(lit.electron)
            of_reads = electron**2 * lit.read_variance
            light = byref(_Lit(*map(_at, held), electron, of_reads, lit.is_offset))
        self._c.aixsim_detect(
            _at(acc), _at(keys), acc.numel() // max(columns, 1), columns, int(first), levels,
            light, by_row, seen, self._threads,
        )  # fmt: skip

    def look_at_scores(
        self, scores: Scores, v: Tensor, at: Range, quantiles: Sequence[float] | None
    ) -> None:
        if quantiles is not None or at.is_set():
            return super().look_at_scores(scores, v, at, quantiles)
        # by the very products that are detected afterwards: none lies beyond by a last bit
        trial = NativeRange(at.running, (0.0, 0.0), at.levels)
        self.attend(scores, v, trial, None, rowmax=False)
        at.take(torch.tensor(trial.ends(), dtype=torch.float32))

    def attend(
        self,
        scores: Scores,
        v: Tensor,
        at: Range,
        keys: Tensor | None,
        *,
        rowmax: bool,
        lamp: Lamp | None = None,
    ) -> Attended:
        assert lamp is None, "an attention with light is made in torch"
        rows = scores.shape[:4]
        light, (total, kept) = v.new_zeros(*rows, v.shape[-1]), v.new_zeros(2, *rows, 1)
        about, _held = self._about(scores, v, at, keys, rowmax)
        room = self._room(about)
        self._c.aixsim_attend(
            byref(about), _at(light), _at(total), _at(kept), _at(room), _of(at)[1]
        )
        return Attended(light, total, kept)

    def attend_grad(
        self,
        scores: Scores,
        v: Tensor,
        at: Range,
        keys: Tensor | None,
        grad: Tensor,
        *,
        rowmax: bool,
        grad_mask: Tensor | None = None,
        lamp: Lamp | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert lamp is None, "an attention with light is made in torch"
        if grad_mask is not None:  # rare: a bias that is learned
            return super().attend_grad(
                scores, v, at, keys, grad, rowmax=rowmax, grad_mask=grad_mask
            )
        grad = grad.flatten(1, 2)
        # a row of it lies together, and rows do not overlap
        if grad.stride(-1) != 1 or grad.stride(-2) < grad.shape[-1]:
            grad = grad.contiguous()
        grad_q = torch.zeros_like(scores.q)
        grad_k, grad_v = torch.zeros_like(scores.k), torch.zeros_like(v)
        about, _held = self._about(scores, v, at, keys, rowmax)
        room = self._room(about)
        strides = (c_long * 3)(*grad.stride()[:3])
        self._c.aixsim_attend_grad(
            byref(about), _at(grad), strides, *map(_at, (grad_q, grad_k, grad_v, room))
        )
        return grad_q, grad_k, grad_v

    def _room(self, about: _Attention) -> Tensor:
        """What the threads work on: float32 (threads, n), of torch, so that it is told of."""
        floats = c_long()
        self._c.aixsim_room(byref(about), byref(floats))
        return torch.empty(self._threads, floats.value, dtype=torch.float32)

    def _about(
        self, scores: Scores, v: Tensor, at: Range, keys: Tensor | None, rowmax: bool
    ) -> tuple[_Attention, tuple]:
        """What both directions take, and the tensors that it points to."""
        mask, shut = scores.mask, 0.0
        if mask is not None:
            # what is expanded stays so, but for a row, which lies together
            own = mask[tuple(slice(None if step else 1) for step in mask.stride())]
            if mask.dtype != torch.bool:
                own, shut = own.float(), torch.finfo(mask.dtype).min / 2
            if mask.stride(-1) != 1:
                own = own.expand(*own.shape[:-1], mask.shape[-1]).contiguous()
            mask = own.expand(mask.shape)
        assert isinstance(at, NativeRange)
        # a thread that would have less than 2^18 products is not woken
        products = math.prod(scores.shape) * (scores.q.shape[-1] + v.shape[-1])
        threads = max(1, min(self._threads, products >> 18))
        held = scores.q.contiguous(), scores.k.contiguous(), v.contiguous(), keys, mask
        about = _Attention(
            *map(_at, held), matrix_product(), *scores.shape, scores.q.shape[-1], v.shape[-1],
            int(scores.later),
            mask.stride()[:4] if mask is not None else (0,) * 4,
            mask is not None and mask.dtype == torch.bool, scores.is_causal, rowmax, threads,
            shut, scores.scale, scores.levels - 1, at.levels_at,
        )  # fmt: skip
        return about, held


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _of(at: Range) -> tuple:
    assert isinstance(at, NativeRange)
    return byref(at.levels_at), byref(at.seen)


def _wide(codes: Tensor | None) -> bool:
    return codes is not None and codes.dtype != torch.uint8


def _grid(ends: Sequence[float], levels: int) -> _Grid:
    """As `grid.grid`, each step of which is float32: what a structure holds is rounded to that."""
    (lo, hi), top = ends, levels - 1
    width = c_float(hi - lo).value
    per_level = c_float(c_float(1 / width).value * top).value if width else math.inf
    if math.isinf(per_level):
        return _Grid(lo, hi, 0.0, 1.0, top)
    return _Grid(lo, hi, width / top, per_level, top)

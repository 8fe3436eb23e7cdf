"""The calls of a model, and which of them a module takes part in: all its parts draw its noise.

A call is one forward of the whole model. Its word, a hash of (step, call, rank), turns the stream
of a module into the module's noise key.

Activation checkpointing runs parts of a call again in the backward, when other calls may have come
in between, and what is recomputed must draw the noise of its own call. Autograd numbers the nodes
of a thread's graphs in the order in which they are made, and knows at which node the backward is:
its call is the last that had begun when that node was made.
"""

import itertools
import sys
import threading
from bisect import bisect_right
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aixsim_cli.errors import RunError

# calls of a thread that a backward can still find: far more than have graphs at a time
_KEPT = 1024
_ENGINE = torch.autograd.graph._engine_run_backward.__code__

_HIDDEN = (
    "activation checkpointing: a part of a simulated model is recomputed, and nothing tells of "
    "which call"
)

_numbers = itertools.count()
_models: "WeakValueDictionary[int, Calls]" = WeakValueDictionary()
_lock = threading.Lock()


class _Call(NamedTuple):
    """A call of the model.

    Args:
        first: number of the first node that autograd made after its begin.
        word: what makes its noise its own.
        has_graph: whether gradients were on when it began.
    """

    first: int
    word: int
    has_graph: bool


class _Recomputed(NamedTuple):
    """What a backward recomputes.

    Args:
        task: the backward.
        frame: what autograd runs for the node that the backward is at.
        word: of its call.
    """

    task: int
    frame: FrameType
    word: int


class _Thread:
    """The calls that a thread made: it numbers its own nodes. Their graphs keep it when it ends."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        # number of the first node made after the last call
        self.end = 0
        # the call under way: a flag would outlast a KeyboardInterrupt
        self.running: FrameType | None = None
        self._recomputed: list[_Recomputed] = []

    def recompute(self, task: int, word: int) -> None:
        """Remember what the node that the backward is at recomputes, as long as it is there."""
        self._recomputed.append(_Recomputed(task, _node_call(), word))
        # a frame holds tensors
        torch.autograd.Variable._execution_engine.queue_callback(self._forget)

    def _forget(self) -> None:
        """Drop what the backward has left, or raised in."""
        while self._recomputed and not _lasts(self._recomputed[-1].frame):
            self._recomputed.pop()

    def recomputed(self) -> _Recomputed | None:
        """The innermost that is under way."""
        self._forget()
        return self._recomputed[-1] if self._recomputed else None


class Calls:
    """The calls of one model; its modules share it."""

    def __init__(self) -> None:
        self._enrol(0)

    def _enrol(self, newest: int) -> None:
        # a number, for compiled code to name the model by; a copy of the model is another
        self.number = next(_numbers)
        _models[self.number] = self
        self._newest = newest
        self._local = threading.local()
        self._threads: WeakSet[_Thread] = WeakSet()

    def __getstate__(self) -> int:
        return self._newest

    def __setstate__(self, newest: int) -> None:
        self._enrol(newest)

    @property
    def _thread(self) -> _Thread:
        """The one that asks."""
        if not hasattr(self._local, "thread"):
            self._local.thread = _Thread()
            with _lock:
                self._threads.add(self._local.thread)
        return self._local.thread

    def begin(self, word: int) -> bool:
        """Begin a call, unless the whole model is recomputed.

        Args:
            word: of the call, signed 64-bit.

        Returns:
            Whether a call began.

        Raises:
            RunError: the model is recomputed in a way that hides which call it was.
        """
        if torch._C._current_graph_task_id() != -1:
            self._expect_known()
            return False
        self._newest = word
        call = _Call(torch.autograd._get_sequence_nr(), word, torch.is_grad_enabled())
        calls = self._thread.calls
        if calls and calls[-1]._replace(word=word) == call:
            # that one left no node behind
            calls.pop()
        calls.append(call)
        del calls[:-_KEPT]
        return True

    def enter(self) -> None:
        """A module is called that all of the call happens in; for its forward pre-hook."""
        self._thread.running = _module_call()

    def leave(self, outputs: object) -> None:
        """A module's call ends, which may be the one that `enter` was told of.

        Args:
            outputs: what the module returns, tensors in any nest that pytree knows.
        """
        thread = self._thread
        if thread.running is not _module_call():
            return
        thread.running = None
        if torch._C._current_graph_task_id() == -1:
            thread.end = torch.autograd._get_sequence_nr()
        for output in tree_leaves(outputs):
            node: Any = output.grad_fn if isinstance(output, Tensor) else None
            if node is not None:
                node.metadata["aixsim", self.number] = thread

    @property
    def is_running(self) -> bool:
        """Whether this thread is within a call that it told `enter` of."""
        return _lasts(self._thread.running)

    def word(self) -> int:
        """The word of the call that is running, or being recomputed.

        Raises:
            RunError: it is recomputed, and nothing tells which call it was.
        """
        thread, task = self._thread, torch._C._current_graph_task_id()
        if task == -1:
            return thread.calls[-1].word if thread.calls else self._newest
        outer = thread.recomputed()
        if outer is not None and outer.task != task and _node_number() >= thread.end:
            # a backward within that backward, through what was recomputed there
            return outer.word
        word = self._at_node().word
        if outer is None or outer.task != task:
            thread.recompute(task, word)
        return word

    def _at_node(self) -> _Call:
        """The call that made the node that the backward is at."""
        calls, node = self._recorded()
        found = bisect_right(calls, node, key=lambda call: call.first) - 1
        if found < 0:
            raise RunError(
                "activation checkpointing: a part of a simulated model is recomputed whose call "
                f"is not known: it ran outside of the model, or more than {_KEPT} calls ago"
            )
        return calls[found]

    def _recorded(self) -> tuple[list[_Call], int]:
        """The calls of the thread that made the graph; number of the node the backward is at."""
        with _lock:
            # without calls: the engine's own, which may run a backward
            threads = [thread.calls for thread in self._threads if thread.calls]
        threads = [c for c in threads if any(call.has_graph for call in c)] or threads
        if len(threads) > 1:
            raise RunError(f"{_HIDDEN}: several threads trained it")
        return threads[0] if threads else [], _node_number()

    def _expect_known(self) -> None:
        calls, node = self._recorded()
        # a reentrant checkpoint is one node, made just before what it runs without gradients
        if any(call.first == node + 1 and not call.has_graph for call in calls):
            raise RunError(
                "activation checkpointing: a whole simulated model is recomputed by a reentrant "
                "checkpoint, which hides its call; expected use_reentrant=False, or checkpoints "
                "of the model's blocks"
            )
        self._at_node()


def _node_number() -> int:
    """Number of the node that the backward is at."""
    node: Any = torch._C._current_autograd_node()
    if node is None:
        raise RunError(f"{_HIDDEN}: autograd has no node")
    return node._sequence_nr()


def _node_call() -> FrameType:
    """What autograd runs for the node that the backward is at."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_back.f_code is not _ENGINE:
        frame = frame.f_back
    return frame


def _module_call() -> FrameType:
    """The call of the module whose hook asks; compiled, it has the name and other code."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame


def _lasts(call: FrameType | None) -> bool:
    """Whether a call is under way in this thread: it is on the stack."""
    frame = sys._getframe()
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def noise_key(stream: Tensor, calls: Calls) -> Tensor:
    """The noise key of a module in the call that is running: int64, 0-d, on the stream's device.

    Args:
        stream: int64, 0-d; the module's.
        calls: of its model.
    """
    if torch.compiler.is_exporting():
        # a program that outlives the model has no calls
        return stream.clone()
    if torch.compiler.is_compiling():
        # not compiled anew for every call, but asked for its word when it runs
        return _noise_key(stream, calls.number)
    return _xor(stream, calls)


def _xor(stream: Tensor, calls: Calls | None) -> Tensor:
    return stream ^ (0 if calls is None else calls.word())


# a CUDA graph would replay the word of the call that it was recorded in
@torch.library.custom_op("aixsim::noise_key", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _noise_key(stream: Tensor, model: int) -> Tensor:
    return _xor(stream, _models.get(model))


@_noise_key.register_fake
def _(stream, model):
    return torch.empty_like(stream)

"""The calls of a model, and which of them a module takes part in: all its parts draw its noise.

A call is one forward of the whole model. Its word, a hash of (step, call, rank), turns the stream
of a module into the module's noise key.

Activation checkpointing runs parts of a call again in the backward, when other calls may have come
in between, and what is recomputed must draw the noise of its own call. Autograd numbers the nodes
of a thread's graphs in the order in which they are made, and knows at which node the backward is:
its call is the last that had begun when that node was made.
"""

import itertools
import threading
from bisect import bisect_right
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from aixsim_cli.errors import RunError

# calls that a backward can still find: far more than have graphs at a time
_KEPT = 1024

_numbers = itertools.count()
_models: "WeakValueDictionary[int, Calls]" = WeakValueDictionary()


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


class Calls:
    """The calls of one model; its modules share it."""

    def __init__(self) -> None:
        self._enrol(0)

    def _enrol(self, newest: int) -> None:
        # a number, for compiled code to name the model by; a copy of the model is another
        self.number = next(_numbers)
        _models[self.number] = self
        self._newest = newest
        # a thread numbers its own nodes
        self._of_thread: dict[int, list[_Call]] = {}
        # the backward under way and the word of what it recomputed last
        self._recomputed: tuple[int, int] | None = None

    def __getstate__(self) -> int:
        return self._newest

    def __setstate__(self, newest: int) -> None:
        self._enrol(newest)

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
        self._recomputed = None
        self._newest = word
        call = _Call(torch.autograd._get_sequence_nr(), word, torch.is_grad_enabled())
        calls = self._of_thread.setdefault(threading.get_ident(), [])
        if calls and calls[-1].first > call.first:
            # another thread that got the number of one that is gone
            calls.clear()
        if calls and calls[-1]._replace(word=word) == call:
            # that one left no node behind
            calls.pop()
        calls.append(call)
        del calls[:-_KEPT]
        return True

    def word(self) -> int:
        """The word of the call that is running, or being recomputed.

        Raises:
            RunError: it is recomputed, and nothing tells which call it was.
        """
        task = torch._C._current_graph_task_id()
        if task == -1:
            self._recomputed = None
            return self._newest
        if self._recomputed is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        elif self._recomputed[0] != task:
            # a backward within that backward, through what was recomputed there
            return self._recomputed[1]
        word = self._at_node().word
        self._recomputed = (task, word)
        return word

    def _end_backward(self) -> None:
        self._recomputed = None

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
        node: Any = torch._C._current_autograd_node()
        threads = list(self._of_thread.values())
        threads = [c for c in threads if any(call.has_graph for call in c)] or threads
        if node is None or len(threads) > 1:
            why = "several threads trained it" if node is not None else "autograd has no node"
            raise RunError(
                "activation checkpointing: a part of a simulated model is recomputed, and nothing "
                f"tells of which call: {why}"
            )
        return threads[0] if threads else [], node._sequence_nr()

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

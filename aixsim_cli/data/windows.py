"""From rows of text to windows of tokens, on every rank, resumable to the token."""

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from datasets import IterableDataset as RowStream
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset

from aixsim_cli.data.local import has_text
from aixsim_cli.data.tokenizer import DocumentEncoder
from aixsim_cli.errors import RunError, UserError

_LONGEST_WAIT = 60

logger = logging.getLogger("aixsim")


class TextDataset(IterableDataset, Stateful):
    """Documents, tokenised and packed end to end into windows, this rank's share of them.

    Rows without text are skipped. A rank that comes to the end of its share starts it again by
    itself, whatever the other ranks do, so that shares may differ in length. Where there are
    fewer documents than ranks, no rank starves: a map-style set's rows are then read by several
    ranks each, and a rank whose share has no text at all reads everything.

    Iteration goes on where the object stands: a new iterator, or `load_state_dict`, continues with
    the very next token.

    Args:
        data: rows with a "text", of any length, the same on every rank.
        tokenizer: see `DocumentEncoder`.
        name: of the data set, for messages.
        seq_len: tokens per window.
        dp_rank: this rank among those that read different data.
        dp_world_size: how many ranks do.
        infinite: start again at the end; False = an iterator ends after one pass, and the tokens
            that do not fill a window are dropped.
        retries: how often in a row a failed read of a stream is tried again, after 1, 2, 4, … 60
            seconds, at the same row.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        data: Dataset | RowStream,
        tokenizer: Any,
        *,
        name: str,
        seq_len: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        infinite: bool = True,
        retries: int = 0,
    ) -> None:
        self.name = name
        self.retries = retries
        self.seq_len = seq_len
        self.infinite = infinite
        self._encode = DocumentEncoder(tokenizer)
        self._all = data
        self._data = _share(data, dp_rank, dp_world_size)
        self._buffer: list[int] = []
        self._epoch = 0
        self._rows = 0  # of this pass, read so far
        self._documents = 0  # those of them with text
        self._reads_all = dp_world_size == 1
        self._stream_state: dict[str, Any] | None = None  # loaded, not yet continued
        self._skip = 0  # rows of the stream to pass over, where no state of it is known

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Windows as torchtitan's trainer wants them.

        Yields:
            ({"input": int64 (seq_len,)}, labels int64 (seq_len,)): labels are the next tokens. A
            window consumes seq_len + 1 tokens.

        Raises:
            UserError: a whole pass over the data found no text.
            RunError: the data could not be read any further.
        """
        self.load_state_dict(self.state_dict())
        length = self.seq_len + 1
        while True:
            for text in self._texts():
                self._buffer += self._encode(text)
                while len(self._buffer) >= length:
                    window = torch.tensor(self._buffer[:length])
                    del self._buffer[:length]
                    yield {"input": window[:-1]}, window[1:]
            starved = not self._documents
            self._end_pass()
            if not self.infinite and not starved:
                self._buffer = []
                return

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, row, and the tokens read but not yet in a window."""
        state = {
            "token_buffer": list(self._buffer),
            "epoch": self._epoch,
            "rows": self._rows,
            "documents": self._documents,
            "reads_all": self._reads_all,
        }
        if isinstance(self._data, RowStream):
            known = None if self._skip else self._data.state_dict()
            state["stream"] = self._stream_state or known
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position that `state_dict` gave, of the same data, rank and world size.

        Where its "stream" is None, the stream is read from its start up to row "rows".
        """
        self._buffer = list(state_dict["token_buffer"])
        self._epoch = state_dict["epoch"]
        self._rows = state_dict["rows"]
        self._documents = state_dict["documents"]
        if state_dict["reads_all"] and not self._reads_all:
            self._read_all()
        if isinstance(self._data, RowStream):
            # the epoch first: a stream ignores a position of another epoch than its own
            self._data.set_epoch(self._epoch)
            self._stream_state = copy.deepcopy(state_dict["stream"])
            self._skip = self._rows if self._stream_state is None else 0
            if self._stream_state is not None:
                self._data.load_state_dict(self._stream_state)

    def _texts(self) -> Iterator[str]:
        """The texts of the rest of this pass."""
        data = self._data
        if isinstance(data, Dataset):
            rows = map(data.__getitem__, range(self._rows, len(data)))
        else:
            rows = self._stream(data)
        for row in rows:
            self._stream_state = None
            self._rows += 1
            if has_text(row):
                self._documents += 1
                yield row["text"]

    def _stream(self, data: RowStream) -> Iterator[dict[str, Any]]:
        """The rows of a stream, from where it stands; a read that fails is tried again."""
        position = self._stream_state or data.state_dict()
        rows, failures = iter(data), 0
        while True:
            try:
                row = next(rows, None)
            except UserError:
                raise
            except Exception as error:  # what a broken connection raises differs between sources
                failures += 1
                self._wait_or_give_up(failures, error)
                data.load_state_dict(position)
                rows = iter(data)
                continue
            if row is None:
                return
            position, failures = data.state_dict(), 0
            if self._skip:
                self._skip -= 1
            else:
                yield row

    def _wait_or_give_up(self, failures: int, error: Exception) -> None:
        what = (
            f"dataset {self.name}: reading failed after row {self._rows - self._skip} of pass "
            f"{self._epoch + 1} ({type(error).__name__}: {error})"
        )
        if failures > self.retries:
            raise RunError(
                f"{what}; tried {failures} times; start the same run again to resume from its "
                "last checkpoint"
            ) from error
        seconds = min(2 ** (failures - 1), _LONGEST_WAIT)
        logger.warning("%s; trying again in %d s (%d of %d)", what, seconds, failures, self.retries)
        time.sleep(seconds)

    def _end_pass(self) -> None:
        if self._documents:
            self._report_pass()
        elif not self._reads_all:
            logger.warning(
                "dataset %s: no text in this rank's share; the rank reads all of it", self.name
            )
            self._read_all()
        else:
            raise UserError(
                f"dataset {self.name}: not one row has text; expected a field 'text' with strings "
                "that are not empty"
            )
        self._epoch += 1
        self._rows = self._documents = 0
        if isinstance(self._data, RowStream):
            self._data.set_epoch(self._epoch)

    def _report_pass(self) -> None:
        if self._epoch == 0:
            skipped = self._rows - self._documents
            logger.warning(
                "dataset %s: read to its end on this rank, %d documents%s%s",
                self.name,
                self._documents,
                f", {skipped} rows without text skipped" if skipped else "",
                "; it starts again, now and whenever it ends" if self.infinite else "",
            )

    def _read_all(self) -> None:
        self._data = _share(self._all, 0, 1)
        self._reads_all = True


def _share(data: Dataset | RowStream, rank: int, world_size: int) -> Dataset | RowStream:
    if isinstance(data, Dataset):
        # it cannot be cut into more parts than it has rows
        parts = max(1, min(world_size, len(data)))
        # in turn, as streams are: another number of ranks can then go on where these stopped
        return data.shard(parts, rank % parts, contiguous=False)
    return split_dataset_by_node(data, rank, world_size)


def heldout_windows(
    texts: Iterable[Any], tokenizer: Any, seq_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a text's token stream t0 … tn for an exact perplexity: t1 … tn are predicted once each.

    Args:
        texts: documents; those that are no string or empty are skipped.
        tokenizer: see `DocumentEncoder`; documents become tokens as they do in training.
        seq_len: tokens per window.

    Yields:
        (inputs, labels), int64 (seq_len,): inputs of consecutive windows do not overlap, labels
        are the next tokens. The last window is as short as what is left.
    """
    encode = DocumentEncoder(tokenizer)
    buffer: list[int] = []
    for text in texts:
        if not has_text({"text": text}):
            continue
        buffer += encode(text)
        while len(buffer) > seq_len:
            window = torch.tensor(buffer[: seq_len + 1])
            # its last label is the next window's first input
            del buffer[:seq_len]
            yield window[:-1], window[1:]
    if len(buffer) > 1:
        window = torch.tensor(buffer)
        yield window[:-1], window[1:]

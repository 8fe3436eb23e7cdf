"""A data loader whose position can be taken up by another number of ranks."""

import io
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader

from aixsim_cli.data.corpus import Split
from aixsim_cli.data.sources import open_source
from aixsim_cli.data.windows import TextDataset
from aixsim_cli.errors import UserError

_RANK_KEY = "dp_rank_"


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, texts, lists and dicts; nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"dataloader: refused: its state names {module}.{name}")


class ResumableLoader(ParallelAwareDataloader):
    """torchtitan's loader over a `TextDataset`; a state of other ranks is divided anew.

    See torchtitan's `ParallelAwareDataloader` for the arguments.
    """

    _marked: dict[str, Any] | None = None
    _told: dict[str, Any] | None = None

    def mark(self) -> None:
        """Remember where it stands."""
        self._marked = StatefulDataLoader.state_dict(self)

    def return_to_mark(self) -> None:
        """Let `state_dict` give the marked position from now on; nothing more is read."""
        self._told = self._marked

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank, pickled, as torchtitan has it."""
        if self._told is None:
            return super().state_dict()
        return {self._rank_id: pickle.dumps(self._told), "world_size": self.dp_world_size}

    def state_to_load(self, present: Iterable[str]) -> dict[str, Any]:
        """What to ask a checkpoint for: this rank's position, or those of all ranks it has.

        Args:
            present: keys of the checkpoint, dotted.
        """
        prefix = f"dataloader.{_RANK_KEY}"
        saved = {key.removeprefix("dataloader.") for key in present if key.startswith(prefix)}
        own = f"{_RANK_KEY}{self.dp_rank}"
        wanted = {own} if not saved or len(saved) == self.dp_world_size else saved
        return {key: b"" for key in wanted} | {"world_size": 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position, of as many ranks or of others (see `divide_anew`)."""
        if not state_dict:
            return
        ranks = sorted(
            (key for key in state_dict if key.startswith(_RANK_KEY)),
            key=lambda key: int(key.removeprefix(_RANK_KEY)),
        )
        states = [_PlainUnpickler(io.BytesIO(state_dict[key])).load() for key in ranks]
        if state_dict["world_size"] == self.dp_world_size:
            StatefulDataLoader.load_state_dict(self, states[0])
            return
        positions = [_position(state) for state in states]
        self.dataset.load_state_dict(divide_anew(positions, self.dp_rank, self.dp_world_size))  # pyright: ignore[reportAttributeAccessIssue]


def build_dataloader(
    *,
    dataset: str,
    dataset_path: str | None,
    split: Split,
    tokenizer: Any,
    seq_len: int,
    batch_size: int,
    dp_rank: int,
    dp_world_size: int,
    infinite: bool,
    retries: int = 0,
    num_workers: int = 0,
    **loader_options: Any,
) -> ResumableLoader:
    """One rank's data loader for torchtitan's trainer.

    Args:
        dataset: a key of `SOURCES`.
        dataset_path: of dataset "local", else None.
        split: "train" or "heldout".
        tokenizer: see `DocumentEncoder`.
        seq_len: tokens per window.
        batch_size: windows per batch.
        dp_rank: this rank among those that read different data.
        dp_world_size: how many ranks do.
        infinite: start again at the end of the data.
        retries: of a failed read, see `TextDataset`.
        num_workers: 1 reads ahead in a process of its own. A rank's tokens are one sequence, so
            more cannot share the work.
        loader_options: the rest of torchtitan's `training.dataloader` (pin_memory, …).

    Returns:
        A `ResumableLoader` over a `TextDataset`.

    Raises:
        UserError: as `open_source` and `TextDataset`, or more than one worker.
    """
    if num_workers > 1:
        raise UserError(
            f"training.dataloader.num_workers: got {num_workers}; expected 0 or 1, because a "
            "rank's tokens are one sequence"
        )
    windows = TextDataset(
        open_source(dataset, dataset_path, split),
        tokenizer,
        name=dataset_path or dataset,
        seq_len=seq_len,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        infinite=infinite,
        retries=retries,
    )
    return ResumableLoader(
        windows,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        batch_size=batch_size,
        num_workers=num_workers,
        **loader_options,
    )


def divide_anew(positions: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The position of one rank, from those of another number of ranks.

    Rows are dealt to ranks in turn, so what N ranks have read is, nearly, the beginning of the
    data: `world_size` ranks go on behind as many rows as were read in all. Ranks that are still in
    an earlier pass over the data skip its rest. Tokens that were read but not yet trained on are
    handed to the new ranks in turn, so that none is lost or seen twice.

    Args:
        positions: `TextDataset.state_dict()` of each old rank.
        rank: the new rank.
        world_size: number of new ranks.
    """
    epoch = max(position["epoch"] for position in positions)
    current = [position for position in positions if position["epoch"] == epoch]

    def share(count: int) -> int:
        return max(0, -(-(count - rank) // world_size))

    return {
        "token_buffer": [t for p in positions[rank::world_size] for t in p["token_buffer"]],
        "epoch": epoch,
        "rows": share(sum(position["rows"] for position in current)),
        "documents": share(sum(position["documents"] for position in current)),
        "reads_all": world_size == 1,
        "stream": None,
    }


def _position(state: dict[str, Any]) -> dict[str, Any]:
    """The data set's own state within a loader's."""
    if "_snapshot" in state:  # of a worker process
        worker = state["_snapshot"]["_worker_snapshots"]["worker_0"]
        state = worker
    position = state.get("dataset_state")
    return position if position is not None else state["fetcher_state"]["dataset_iter_state"]

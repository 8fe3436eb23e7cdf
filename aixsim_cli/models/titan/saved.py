"""Read and write torchtitan's checkpoints (PyTorch DCP) without a process group."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aixsim_cli.config.pretrain import CONFIG_FILE, PretrainConfig, load_config
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.models.titan.storage import (
    CheckpointPlanner,
    CheckpointReader,
    CheckpointWriter,
    dcp_reason,
)
from aixsim_cli.run.checkpoints import verify_by_all_ranks
from aixsim_cli.settings.document import load_yaml
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, Choice
from aixsim_cli.transforms.loaded import check_numbers
from aixsim_cli.transforms.read import require_paradigms

_MODEL_KEYS = ("tok_embeddings.", "layers.", "norm.", "output.")


@dataclass(frozen=True)
class TitanCheckpoint:
    """A torchtitan checkpoint in memory.

    Args:
        state_dict: the model's weights and a transform's buffers, under torchtitan's names.
        config: of the run that wrote it; None when the folder has no config.yaml.
    """

    state_dict: dict[str, Tensor]
    config: PretrainConfig | None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.state_dict["tok_embeddings.weight"].shape[0]


def read_checkpoint(folder: str | Path, transform: Choice = KEEP_OWN) -> TitanCheckpoint:
    """Load the model of a `step-N` folder, on the CPU.

    Args:
        folder: that holds it.
        transform: that it will be used with; where it is not its own, its config's is left out,
            and need not be installed.

    Raises:
        UserError: a file is missing or damaged, there is no Llama model in it, or its weights are
            not finite.
    """
    folder = Path(folder)
    verify_by_all_ranks(folder)
    reader = CheckpointReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    try:
        state_dict = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.items()
            if key.startswith(_MODEL_KEYS) and isinstance(entry, TensorStorageMetadata)
        }
        with _alone():
            dcp.load(state_dict, storage_reader=reader, planner=CheckpointPlanner(), no_dist=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged entry makes of itself
        raise UserError(
            f"{folder}: damaged or incomplete ({dcp_reason(error)}); expected a complete "
            "checkpoint, as another step-N may be"
        ) from error
    if "tok_embeddings.weight" not in state_dict:
        raise UserError(f"{folder}: holds no model (no tok_embeddings.weight)")
    check_numbers(state_dict, str(folder))
    config_path = folder / CONFIG_FILE
    config = _read_config(config_path, transform) if config_path.is_file() else None
    return TitanCheckpoint(state_dict, config)


def _read_config(path: Path, transform: Choice) -> PretrainConfig:
    if transform is not KEEP_OWN:
        return load_config(path, transform=DIGITAL)
    require_paradigms(load_yaml(path).data.get("transform"), source=str(path))
    return load_config(path)


def write_checkpoint(state_dict: dict[str, Tensor], folder: str | Path) -> None:
    """Write a model-only checkpoint that `pretrain` can start from.

    Args:
        state_dict: under torchtitan's names.
        folder: written to, its manifest last.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with _alone():
            dcp.save(state_dict, storage_writer=CheckpointWriter(folder), no_dist=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {dcp_reason(error)}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns that there is no process group, even when told so, and wraps what is raised.

    Its wrapper is no `Exception`, and hides a signal's Stopped or KeyboardInterrupt.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error

"""torchtitan's checkpoints, each with the configuration it was trained with.

A checkpoint folder `step-N` holds torchtitan's DCP files and `config.yaml`, so that it can be
converted, evaluated and resumed wherever it is copied to.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import CheckpointManager

from aixsim_cli.backends.titan.schema import PretrainConfig, dump_config
from aixsim_cli.errors import UserError

CONFIG_FILE = "config.yaml"


class Checkpointer(CheckpointManager):
    """Writes the run's config into every checkpoint, before torchtitan's files.

    torchtitan writes `.metadata` last, and a folder without it is never loaded: a checkpoint that
    can be loaded has its config.
    """

    run_config: PretrainConfig

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        if dist.get_rank() == 0:
            folder = Path(checkpoint_id)
            folder.mkdir(parents=True, exist_ok=True)
            dump_config(self.run_config, folder / CONFIG_FILE)
        return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            present = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
            # a digital checkpoint has no ranges; they stay unset, and are calibrated in training
            wanted = {k: v for k, v in state_dict.items() if k in present or not _is_range(k)}
            return super().dcp_load(wanted, checkpoint_id, *args, **kwargs)
        except (RuntimeError, ValueError, KeyError, OSError, CheckpointException) as error:
            raise UserError(
                f"{checkpoint_id}: cannot be loaded into this run: {_last_line(error)}; "
                "expected a whole checkpoint of the same model, tokenizer and transform, or "
                "another job.dump_folder to start anew"
            ) from error


def _is_range(key: str) -> bool:
    return key.endswith(".ranges")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # DCP prefixes a traceback; the reason stands in its last line
    return lines[-1] if lines else type(error).__name__

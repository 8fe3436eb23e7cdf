"""What a SOURCE argument is: a torchtitan checkpoint, a Hugging Face folder, or a hub name."""

from enum import Enum
from pathlib import Path

from aixsim_cli.errors import UserError
from aixsim_cli.run.manifest import is_complete, verify, verify_if_listed
from aixsim_cli.run.replace import WORKPLACES, interrupted


class SourceKind(Enum):
    """Where a model comes from."""

    TITAN = "torchtitan checkpoint"
    HF = "Hugging Face folder"
    HUB = "hub name"


def find_source(source: str) -> SourceKind:
    """Tell what kind of model `source` names, by looking at the folder.

    A Hugging Face folder that has a manifest is verified here, whoever is going to read it.

    Raises:
        UserError: nothing there, neither format, or a file is not what was written.
    """
    if not source.strip():
        raise UserError(
            "SOURCE: got an empty text; expected a torchtitan checkpoint folder (…/step-N), a "
            "Hugging Face folder or a hub name (owner/name)"
        )
    path = Path(source)
    if killed := interrupted(path):
        raise UserError(f"{source}: {killed}")
    if (path / ".metadata").is_file():
        return SourceKind.TITAN
    if (path / "config.json").is_file():
        verify_if_listed(path)
        return SourceKind.HF
    if is_complete(path):
        # neither kind of file is there, though the manifest may say so
        verify(path)
    if path.is_dir():
        newest = _newest_step(path)
        hint = f"; did you mean {newest}?" if newest else ""
        if (path / "adapter_config.json").is_file():
            hint = "; a PEFT adapter: expected the model as PEFT's merge_and_unload gives it"
        if any((path / name).exists() for name in WORKPLACES):
            hint = (
                "; continual-pretrain was killed while it saved its model: the same command with "
                "--resume_from_checkpoint true completes it"
            )
        raise UserError(
            f"{source}: holds neither a torchtitan checkpoint (.metadata) nor a Hugging Face model "
            f"(config.json){hint}"
        )
    # a hub name is "name" or "owner/name"; anything that looks like a path is a wrong path
    if (
        path.is_absolute()
        or source.startswith((".", "~"))
        or source.count("/") > 1
        or path.exists()
        or Path(path.parts[0]).is_dir()
    ):
        raise UserError(
            f"{source}: no such folder; expected a torchtitan checkpoint folder (…/step-N), a "
            "Hugging Face folder or a hub name (owner/name)"
        )
    return SourceKind.HUB


def _newest_step(folder: Path) -> Path | None:
    """The last checkpoint in a run's folder, or in a folder of runs; not of a whole disk."""
    found = [
        step.parent
        for pattern in ("", "*/", "*/*/")
        for kind in ("step-*/.metadata", "checkpoint-*/config.json")
        for step in folder.glob(pattern + kind)
        if _step_of(step.parent).isdecimal()
    ]
    return max(found, key=lambda step: int(_step_of(step)), default=None)


def _step_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def check_hf_source(source: str) -> None:
    """See that `source` is a Hugging Face folder, or may be a hub name.

    Raises:
        UserError: as `find_source`, or it is a torchtitan checkpoint.
    """
    if find_source(source) is SourceKind.TITAN:
        raise UserError(
            f"{source}: a torchtitan checkpoint; expected a Hugging Face folder or hub name: "
            f"aixsim convert-ckpt ARCH FLAVOR {source} FOLDER makes one of it"
        )

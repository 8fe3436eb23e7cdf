"""torchtitan's checkpoints, each with the configuration it was trained with, none half trusted.

A checkpoint folder `step-N` holds torchtitan's DCP files, `config.yaml`, so that it can be
converted, evaluated and resumed wherever it is copied to, and `manifest.json`, written last.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
)
from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
    GarbageCollection,
)

from aixsim_cli.config.pretrain import CONFIG_FILE, PretrainConfig, dump_config
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.models.titan.storage import (
    CheckpointPlanner,
    CheckpointReader,
    CheckpointWriter,
    dcp_reason,
)
from aixsim_cli.pretrain import resume
from aixsim_cli.run.checkpoints import Checkpoints, remove, verify_by_all_ranks
from aixsim_cli.run.finite import all_finite
from aixsim_cli.run.inputs import Inputs, write_inputs
from aixsim_cli.run.manifest import begin_saving, is_complete
from aixsim_cli.run.ranks import true_on_all
from aixsim_cli.run.resume import describe, hyperparameters, set_hyperparameters

logger = logging.getLogger("aixsim")


class Checkpointer(CheckpointManager):
    """Saves complete checkpoints, and loads the newest one that is still intact.

    `save_now` makes the next call of `save` write one, whatever the interval; `last_saved` is the
    step that this run saved last, or went on from.
    """

    run_config: PretrainConfig
    inputs: Inputs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_now = False
        self.last_saved: int | None = None
        self._pending: int | None = None
        self.began_at = 0
        # removing a large folder takes long; the training does not wait for it
        self._remover = ThreadPoolExecutor(1)

    @property
    def root(self) -> Path:
        """The folder of all checkpoints."""
        return Path(self.folder)

    @property
    def folders(self) -> Checkpoints:
        """The checkpoints in it."""
        return checkpoints_in(self.root)

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        if curr_step in (0, self._pending, self.last_saved):
            # nothing trained yet, or on the disk: the run was rolled back to it, or ends early
            return False
        return super()._should_save(curr_step, last_step) or (
            self.save_now and self.enable and not self.load_only
        )

    def is_due(self, step: int) -> bool:
        """Whether `save` will write a checkpoint of this step."""
        return self._should_save(step, step == self.run_config.training.steps)

    def is_finite(self) -> bool:
        """Whether weights, ranges and moments are finite, on all ranks, each of which has to ask.

        One pass over what a save would write, and one reduction of a flag.
        """
        (model,) = self.states[MODEL].model
        return true_on_all(all_finite(model, self.states[OPTIMIZER]))

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Write a checkpoint if one is due.

        Raises:
            RunError: it could not be written, and `reliability.on_save_error` is "stop".
        """
        if not self._should_save(curr_step, last_step):
            return
        try:
            super().save(curr_step, last_step)
        except (CheckpointException, OSError, RuntimeError) as error:
            # a save that went wrong in the background is met when the next one begins
            failed = curr_step if self._pending is None else self._pending
            self._give_up(failed, error)
            return
        if self.async_mode == AsyncMode.DISABLED or last_step:
            self.last_saved = curr_step
        if last_step:
            # which torchtitan does not count
            self._purge_stale_checkpoints()

    def wait(self) -> None:
        """Return when a save in the background, if any, is on the disk.

        Raises:
            RunError: it could not be written, and `reliability.on_save_error` is "stop".
        """
        if not self.enable or self._pending is None:
            return
        try:
            self._async_wait()
        except (CheckpointException, OSError, RuntimeError) as error:
            self._give_up(cast(int, self._pending), error)

    def _async_wait(self) -> None:
        super()._async_wait()
        if self._pending is not None:
            self.last_saved, self._pending = self._pending, None
            self._purge_stale_checkpoints()

    def _give_up(self, step: int, error: BaseException) -> None:
        self._pending, self.save_future = None, None
        folder = self.root / f"step-{step}"
        # every rank has met the error; one of them cleans up
        if dist.get_rank() == 0 and not is_complete(folder):
            remove(folder)
        newest = self.folders.newest_complete()
        kept = f"the newest complete one is {newest}" if newest else "there is no other checkpoint"
        said = f"{folder}: could not be written to disk: {dcp_reason(error)}; {kept}"
        if self.run_config.reliability.on_save_error == "stop":
            raise RunError(said) from error
        logger.warning("%s; the run goes on", said)

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """torchtitan's, with our writer: the config first, the manifest last."""
        if to_hf:
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )
        folder = Path(checkpoint_id)
        if dist.get_rank() == 0:
            begin_saving(folder)
            dump_config(self.run_config, folder / CONFIG_FILE)
            write_inputs(self.inputs, folder)
        writer = CheckpointWriter(folder)
        if async_mode == AsyncMode.DISABLED:
            dcp.save(state_dict, storage_writer=writer)
            saved = None
        else:
            self._pending = int(folder.name.removeprefix("step-"))
            in_process = async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM
            saved = dcp.async_save(
                state_dict,
                storage_writer=writer,
                process_group=self.pg,
                async_stager=self.stager if in_process else None,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS
                if in_process
                else AsyncCheckpointerType.THREAD,
            )
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return cast(AsyncSaveResponse | None, saved)

    def load(self, step: int = -1) -> bool:
        """Load a checkpoint into the run.

        Args:
            step: -1 = the newest that is intact; none at all = `initial_load_path`, if any.

        Returns:
            Whether anything was loaded.

        Raises:
            UserError: the checkpoint is damaged, or not of this run's model.
        """
        if not self.enable:
            return False
        # now: the files may be others by the time of a save
        self.inputs = resume.inputs_of(self.run_config)
        if step < 0:
            return self._load_newest() or self._load_initial()
        self.folders.check(step)
        problem = self._load_step(step)
        if problem is not None:
            raise UserError(f"checkpoint.load_step: {problem}; expected another one")
        self._clear_the_way(step)
        return True

    def _clear_the_way(self, step: int) -> None:
        """Move the checkpoints that the run would write over, if it writes any."""
        if self.load_only or step >= self.run_config.training.steps:
            return
        if dist.get_rank() == 0:
            self.folders.set_later_aside(step)
        # no rank writes into a folder that is being moved
        dist.barrier()

    def roll_back(self) -> bool:
        """Go back to the newest complete checkpoint, but not back in the data.

        Returns:
            Whether there was one.

        Raises:
            RunError: there are some, and none of them is intact.
        """
        if not self.enable:
            return False
        self.wait()
        try:
            return self._load_newest(rewind_data=False)
        except UserError as error:  # a mistake no more: the run had begun
            raise RunError(str(error)) from error

    def _load_newest(self, *, rewind_data: bool = True) -> bool:
        unusable: dict[int, str] = {}
        while (step := self.folders.agree(unusable)) is not None:
            problem = self._load_step(step, rewind_data=rewind_data)
            if problem is None:
                return True
            unusable[step] = problem
        return False

    def _load_step(self, step: int, *, rewind_data: bool = True) -> str | None:
        """Load a complete checkpoint; what is wrong with what it holds."""
        folder = Path(self._create_checkpoint_id(step))
        saved = resume.read_settings(folder)
        changed, other_data = {}, False
        if saved is not None:
            others = resume.other_inputs(saved, self.run_config, self.inputs, folder)
            resume.check_resume(saved, self.run_config, folder, step, others=others)
            changed = resume.changes(saved, self.run_config)
            other_data = resume.reads_other_data(saved, self.run_config, others)
        states = self._states_to_load(model_only=step == 0)
        if not rewind_data or other_data:
            states.pop(DATALOADER, None)
        optimizers = list(self.states[OPTIMIZER])
        settings = hyperparameters(optimizers)
        self.dcp_load(states, str(folder), False, False)
        set_hyperparameters(optimizers, list(self.states[LR_SCHEDULER]), settings)
        if not self.is_finite():
            return f"{folder}: holds weights, ranges or moments that are not finite"
        of = self.states[TRAIN_STATE].step if TRAIN_STATE in states else step
        if of != step:
            return f"{folder}: is the checkpoint of step {of}; expected the name it was saved under"
        self.last_saved = step
        if rewind_data:
            self.began_at = step
        if rewind_data and dist.get_rank() == 0:
            last = self.run_config.training.steps
            logger.info(describe(step, folder, changed, last, other_data=other_data))
        return None

    def _load_initial(self) -> bool:
        source = self.initial_load_path
        if not source:
            if self.initial_load_in_hf:
                raise UserError("checkpoint.initial_load_in_hf: needs checkpoint.initial_load_path")
            return False
        if not Path(source).is_dir():
            raise UserError(f"checkpoint.initial_load_path: got '{source}'; no such folder")
        if not self.initial_load_in_hf and (Path(source) / "config.json").is_file():
            raise UserError(
                f"checkpoint.initial_load_path: {source} is a Hugging Face folder; expected a "
                "checkpoint that `aixsim convert-ckpt` made of it"
            )
        verify_by_all_ranks(Path(source), listed=not self.initial_load_in_hf)
        states = self._states_to_load(self.initial_load_model_only)
        in_hf, quantized = self.initial_load_in_hf, self.initial_load_in_hf_quantized
        self.dcp_load(states, source, in_hf, quantized)
        if not self.is_finite():
            raise UserError(
                f"checkpoint.initial_load_path: {source}: holds weights that are not finite"
            )
        return True

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool,
        from_quantized: bool,
    ) -> None:
        """torchtitan's, with our reader; the data's position is fitted to this run's ranks."""
        try:
            if from_hf:
                super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
                return
            reader = CheckpointReader(checkpoint_id)
            present = reader.read_metadata().state_dict_metadata
            # a digital checkpoint has no ranges; they stay unset, and are calibrated in training
            wanted = {k: v for k, v in state_dict.items() if k in present or not _is_range(k)}
            loader = wanted.get(DATALOADER)
            if loader is not None:
                wanted[DATALOADER] = loader.state_to_load(present)
            dcp.load(wanted, storage_reader=reader, planner=CheckpointPlanner())
            if loader is not None:
                loader.load_state_dict(wanted[DATALOADER])
            self.states[MODEL].load_state_dict(wanted)
        except UserError:
            raise
        except (RuntimeError, ValueError, KeyError, OSError, CheckpointException) as error:
            raise UserError(
                f"{checkpoint_id}: cannot be loaded into this run: {dcp_reason(error)}; "
                "expected a complete checkpoint of the same model, tokenizer and transform, or "
                "another job.dump_folder to start anew"
            ) from error

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            self._remover.submit(self.folders.remove_old, self.keep_latest_k)

    def close(self) -> None:
        if hasattr(self, "_remover"):
            self._remover.shutdown()
        super().close()


def checkpoints_in(root: Path) -> Checkpoints:
    """The checkpoints of a pretraining run.

    Args:
        root: of the `step-N` folders.
    """
    return Checkpoints(
        root,
        prefix="step-",
        aside=root.with_name(f"{root.name}.set-aside"),
        key="job.dump_folder",
        asked_by="checkpoint.load_step",
    )


def _is_range(key: str) -> bool:
    return key.endswith(".ranges")

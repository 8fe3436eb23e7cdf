"""What Trainer shows on a terminal: records without what has a number for every kind of layer."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

from aixsim_cli.transforms.state import CLIPPED


def _short(logs: dict[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (logs or {}).items() if not k.startswith(CLIPPED)}


class ShortPrinter(PrinterCallback):
    """Prints records; trainer_state.json, W&B and TensorBoard have them whole."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, _short(logs), **kwargs)


class ShortProgress(ProgressCallback):
    """The same above a progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, _short(logs), **kwargs)


def shorten_records(trainer: Trainer) -> None:
    """Let what prints a trainer's records print short ones."""
    shorter = {PrinterCallback: ShortPrinter, ProgressCallback: ShortProgress}
    handler = trainer.callback_handler
    handler.callbacks = [
        shorter[type(one)]() if type(one) in shorter else one for one in handler.callbacks
    ]

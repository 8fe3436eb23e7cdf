"""Continue a text with transformers' own `generate`."""

import logging
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from aixsim_cli.errors import UserError
from aixsim_cli.models.load import LanguageModel

logger = logging.getLogger("aixsim")


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int,
    do_sample: bool,
    seed: int,
    **sampling: Any,
) -> str:
    """The prompt and its continuation.

    Args:
        model: loaded with `for_generation=True`.
        prompt: not empty.
        max_new_tokens: length of the continuation, in tokens; cut, with a message, to what the
            model's positions leave.
        do_sample: draw tokens (by torch's generator, seeded here) or take the likeliest.
        seed: of the drawing.
        sampling: transformers' `temperature`, `top_k`, `top_p`.

    Raises:
        UserError: the prompt holds no token, is no text, or fills the model's positions.
    """
    module = cast(PreTrainedModel, model.module)
    encoded = _encode(model, prompt).to(module.device)
    room = _room(model, encoded["input_ids"].shape[1], max_new_tokens)
    torch.manual_seed(seed)
    if model.state is not None:
        model.state.begin_step(0)
    tokens = cast(Any, module).generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=room,
        do_sample=do_sample,
        # for the `stop_strings` of a generation_config.json
        tokenizer=model.tokenizer,
        pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
        **sampling,
    )
    return model.tokenizer.decode(tokens[0], skip_special_tokens=True)


def _encode(model: LanguageModel, prompt: str) -> Any:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt: is not text in UTF-8 (at character {error.start}); expected text"
        ) from None
    encoded = model.tokenizer(prompt, return_tensors="pt", verbose=False)
    if not encoded["input_ids"].numel():
        raise UserError("--prompt: got an empty text; expected at least one word")
    return encoded


def _room(model: LanguageModel, prompt: int, asked: int) -> int:
    """How many tokens may follow a prompt of so many."""
    if model.positions is None:
        return asked
    room = model.positions - prompt
    if room < 1:
        raise UserError(
            f"--prompt: got {prompt} tokens; expected fewer than {model.positions}, the positions "
            "that the model has"
        )
    if asked > room:
        logger.warning(
            "--max-new-tokens %d: the model has %d positions, the prompt takes %d; expect at most "
            "%d new tokens",
            asked, model.positions, prompt, room,
        )  # fmt: skip
    return min(asked, room)

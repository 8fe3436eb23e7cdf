"""Continue a text with transformers' own `generate`."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from aixsim_cli.errors import UserError
from aixsim_cli.eval.load import LanguageModel


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
        max_new_tokens: length of the continuation, in tokens.
        do_sample: draw tokens (by torch's generator, seeded here) or take the likeliest.
        seed: of the drawing.
        sampling: transformers' `temperature`, `top_k`, `top_p`.

    Raises:
        UserError: the prompt holds no token.
    """
    module = cast(PreTrainedModel, model.module)
    encoded = model.tokenizer(prompt, return_tensors="pt").to(module.device)
    if not encoded["input_ids"].numel():
        raise UserError("--prompt: got an empty text; expected at least one word")
    torch.manual_seed(seed)
    if model.state is not None:
        model.state.begin_step(0)
    tokens = cast(Any, module).generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
        **sampling,
    )
    return model.tokenizer.decode(tokens[0], skip_special_tokens=True)

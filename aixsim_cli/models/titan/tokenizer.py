"""The tokenizer of a torchtitan checkpoint: the one that it was trained with, or none."""

import logging
from pathlib import Path
from typing import Any

from aixsim_cli.data.tokenizer import DocumentEncoder, load_tokenizer, resolve_tokenizer
from aixsim_cli.errors import UserError
from aixsim_cli.run.inputs import Inputs, read_inputs, tokenizer_digest

logger = logging.getLogger("aixsim")


def trained_tokenizer(
    checkpoint: Path, name: str, *, is_given: bool = False, trust_remote_code: bool = False
) -> Any:
    """A checkpoint's tokenizer, which has to be the one that it was trained with.

    Args:
        checkpoint: a `step-N` folder; one that does not know of its tokenizer is not compared.
        name: of the tokenizer: builtin, a folder or a hub name.
        is_given: the user chose it: another one is told, not refused.
        trust_remote_code: run Python code that it brings.

    Raises:
        UserError: it cannot be loaded, or is another one.
    """
    try:
        folder = resolve_tokenizer(name)
        tokens = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except UserError as error:
        if is_given:
            raise
        raise UserError(
            f"{checkpoint}/config.yaml: model.hf_assets_path: {error}; or convert-ckpt "
            "--tokenizer-path with the place where it is now, and the folder that it makes"
        ) from error
    known = read_inputs(checkpoint)
    if known.tokenizer is None:
        return tokens
    encoder = DocumentEncoder(tokens)
    found = Inputs(tokenizer_digest(folder), frame=encoder.frame, tokens=encoder.digest)
    if "tokenizer" in known.differing(found):
        said = f"tokenizer {name}: is not the one that {checkpoint} was trained with"
        if not is_given:
            raise UserError(
                f"{said}; expected it as it was, or convert-ckpt --tokenizer-path with one that is "
                "meant"
            )
        logger.warning("%s", said)
    return tokens

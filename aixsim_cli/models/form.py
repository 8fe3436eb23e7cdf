"""In which form a Hugging Face folder is saved; `hf/saved.py` says what each is."""

from typing import Literal

from aixsim_cli.errors import UserError

Form = Literal["aixsim", "strict", "plain"]


def choose_form(form: Form | None, strict: bool, plain: bool) -> Form:
    """The one form that is asked for, "aixsim" where none is.

    Args:
        form: of `--form`.
        strict: `--strict`, which is `--form strict`.
        plain: `--plain`, which is `--form plain`.

    Raises:
        UserError: two of them are.
    """
    asked: dict[str, Form] = {f"--form {form}": form} if form else {}
    if strict and form != "strict":
        asked["--strict"] = "strict"
    if plain and form != "plain":
        asked["--plain"] = "plain"
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: expected at most one of them")
    return next(iter(asked.values())) if asked else "aixsim"

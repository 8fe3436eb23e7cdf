"""The form of a saved folder: one option, and its two earlier names."""

import pytest

from aixsim_cli.errors import UserError
from aixsim_cli.models.form import choose_form


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ((None, False, False), "aixsim"),
        (("aixsim", False, False), "aixsim"),
        (("plain", False, False), "plain"),
        ((None, True, False), "strict"),
        ((None, False, True), "plain"),
        (("strict", True, False), "strict"),
    ],
)
def test_one_form_however_it_is_said(asked, form):
    assert choose_form(*asked) == form


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((None, True, True), "--strict and --plain: expected at most one of them"),
        (("aixsim", True, False), "--form aixsim and --strict: expected at most one of them"),
        (("strict", False, True), "--form strict and --plain: expected at most one of them"),
    ],
)
def test_two_forms_are_refused(asked, said):
    with pytest.raises(UserError) as caught:
        choose_form(*asked)
    assert str(caught.value) == said

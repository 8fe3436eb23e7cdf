"""The earlier tool's names for our commands."""

import pytest

from aixsim_cli.commands.aliases import translate


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("eval pt-ppl aixsim 60M step-9 --batch-size 2", "eval ppl step-9 --batch-size 2"),
        ("eval pt-ppl step-9 --batch-size 2", "eval ppl step-9 --batch-size 2"),
        ("eval hf-ppl folder", "eval ppl folder"),
        ("eval hf-lm-eval folder --tasks wikitext", "eval lm-eval folder --tasks wikitext"),
        ("eval hf-gen folder --prompt x", "generate-hf folder --prompt x"),
        ("convert-ckpt pt2hf aixsim 60M a b", "convert-ckpt aixsim 60M a b"),
        ("convert-ckpt hf2pt aixsim 60M a b", "convert-ckpt aixsim 60M a b"),
        ("eval ppl pt-ppl", "eval ppl pt-ppl"),
        ("eval", "eval"),
        ("", ""),
    ],
)
def test_translate(theirs, ours):
    assert translate(theirs.split()) == ours.split()

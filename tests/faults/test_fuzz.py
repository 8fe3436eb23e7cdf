"""Configs and transform files that are wrong in any way are refused in words, never by a crash."""

import copy
import os
import random
from pathlib import Path

import pytest
import yaml

from aixsim_cli.config.pretrain import load_config
from aixsim_cli.errors import UserError
from aixsim_cli.pretrain.plan import describe_transform
from aixsim_cli.transforms.choice import read_choice
from aixsim_cli.transforms.read import read_transform

ROOT = Path(__file__).parent.parent.parent / "configs"
LONG = "AIXSIM_TEST_LONG" in os.environ
SEEDS = range(10 if LONG else 2)
EACH = 100
VALUES = [
    None, True, False, 0, -1, 1, 2**70, 1.5, -0.0, float("nan"), float("inf"), "", "x", "1e-4",
    "é\x00" * 3, "../../etc", "~", "(", "(a+)+$", "[" * 100, [], [None], [1, "a"], {}, {"a": {}},
    {None: 1}, {1: 2}, "0x1F", "2020-01-01", "null", "layers\\..*", "y" * 10_000,
]  # fmt: skip


def places(data, path=()):
    """Every place in a nested document, as a path of keys."""
    found = [path] if path else []
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in list(items):
            found += places(value, (*path, key))
    return found


def mutate(document, rng):
    """A copy with one to three places replaced, removed, renamed or put elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        *parents, key = rng.choice(places(document) or [("a",)])
        owner = document
        for parent in parents:
            owner = owner[parent]
        kind = rng.randrange(4)
        if kind == 0 and key in (owner if isinstance(owner, dict) else ()):
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice(["x", "enable", "default", 3, "layers.0"])] = owner.pop(key, None)
        elif kind == 2:
            owner[key] = copy.deepcopy(rng.choice([document, owner]))
        else:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def scramble(text, rng):
    """The text with a few characters changed, as an editor or a disk would."""
    letters = list(text)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(letters))
        letters[place] = rng.choice(["", "\t", ":", "{", "]", "&", "*", "!", "\x00", "'", "\n- "])
    return "".join(letters)


def attempt(read, text, path):
    """Whether a file is accepted; anything but a UserError is a failure."""
    path.write_text(text, encoding="utf-8")
    try:
        read(path)
    except UserError as error:
        assert str(error).strip()
        return False
    return True


def read_config(path):
    config = load_config(path)
    describe_transform(config)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name, read",
    [
        ("pretrain/debug-optical.yaml", read_config),
        ("transforms/optical.yaml", read_transform),
    ],
    ids=["config", "transform"],
)
def test_mutated_files(tmp_path, name, read, seed):
    rng = random.Random(seed)
    text = (ROOT / name).read_text()
    document = yaml.safe_load(text)
    accepted = 0
    for _ in range(EACH // 2):
        mutated = yaml.safe_dump(mutate(document, rng), allow_unicode=True)
        for candidate in (mutated, scramble(text, rng)):
            try:
                accepted += attempt(read, candidate, tmp_path / "c.yaml")
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}\n{candidate}") from error
    assert accepted < EACH


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern, said",
    [
        # Python's own re takes minutes for this one
        ("(([a-z_.0-9])+)+[A-Z]", "matches no linear"),
        (r"(?:(.+?)(.*?)\1?)+[A-Z]", "takes more than 1 s to match"),
    ],
)
def test_pattern_that_would_never_end(tmp_path, pattern, said):
    path = tmp_path / "t.yaml"
    transform = {"use_regex": True, "layer_name_to_config": {pattern: {}}}
    path.write_text(yaml.safe_dump(transform))
    (tmp_path / "c.yaml").write_text((ROOT / "pretrain/debug-optical.yaml").read_text())
    with pytest.raises(UserError, match=said):
        describe_transform(load_config(tmp_path / "c.yaml", transform=read_choice(path)))

"""YAML and TOML of strangers: what they mean, and that no file makes us wait or print for ever."""

import os
import time
from dataclasses import dataclass, field

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.settings.document import load_yaml
from aixsim_cli.settings.overrides import parse_overrides
from aixsim_cli.transforms.read import read_transform

LIMIT = 1 << 18


@dataclass
class Training:
    steps: int = 1


@dataclass
class Outer:
    training: Training = field(default_factory=Training)


def levels(form, top=30):
    """A bomb: every level holds the one below it twice."""
    lines = ["a0: &a0 {k: v}" if "{" in form else "a0: &a0 [v]"]
    lines += [f"a{i}: &a{i} " + form.replace("@", f"*a{i - 1}") for i in range(1, top)]
    return "\n".join(lines)


BOMBS = {
    "mappings": levels("{x: @, y: @}"),
    "lists": levels("[@, @]"),
    "merges": levels("{<<: [@, @], x: @}"),
    "merged lists of merges": levels("{<<: [@, @, @, @]}"),
    "one long text": "a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 1000 + "]",
    "loop": "a: &a {b: *a}",
    "loop of lists": "a: &a [*a, *a]",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "{a: " * 50_000,
    "deep block": "- " * 50_000 + "x",
    "many nodes": "a: [" + "1," * 120_000 + "]",
    "digits": "a: " + "9" * 5000,
    "hexadecimal digits": "a: 0x" + "f" * 100_000,
    "no end": "a: " + "x" * LIMIT,
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_at_once_in_few_words(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    start = time.thread_time()
    with pytest.raises(UserError) as caught:
        read_transform(path)
    # "many nodes" are read up to the limit
    assert time.thread_time() - start < (15 if name == "many nodes" else 1)
    assert str(caught.value).startswith(f"{path}:") and len(str(caught.value)) < 1000


@pytest.mark.timeout(30)
@pytest.mark.parametrize("value", ["[" * 10_000, levels("[@, @]"), "&a [*a]"])
def test_bombs_as_an_override(value):
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["--training.steps", value], Outer)
    assert str(caught.value).startswith("--training.steps:") and len(str(caught.value)) < 1000


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text", ["a = " + "[" * 20_000, ".".join("a" * 30_000) + " = 1", "a = " + "9" * 5000]
)
def test_toml_bombs(tmp_path, text):
    path = tmp_path / "bomb.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bomb\.toml:") as caught:
        read_transform(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.timeout(30)
@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "cannot be read: a FIFO; expected a text file"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read: a device"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nothing"), "cannot be read: a link to a file that is not"),
        (lambda path: path.mkdir(), "cannot be read: a folder"),
        (lambda path: path.write_bytes("a: 1".encode("utf-16")), ":1: is not text in UTF-8"),
        (lambda path: path.write_bytes(b"a: 1\nb: \xe9\n"), ":2: is not text in UTF-8 (byte 8: 0x"),
        (lambda path: path.write_bytes(b"x" * (LIMIT + 1)), "is too large; expected at most"),
        (lambda path: path.write_bytes(b"a: \0"), "not valid"),
    ],
)  # fmt: skip
def test_what_is_no_text_file_is_named(tmp_path, suffix, make, said):
    path = tmp_path / f"c{suffix}"
    make(path)
    with pytest.raises(UserError) as caught:
        read_transform(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def read(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"key: {value}\n")
    return load_yaml(tmp_path / "c.yaml").data["key"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("010", 10), ("-08", -8), ("0o10", 8), ("0x1F", 31), ("1:30", "1:30"), ("1_000", "1_000"),
        ("1e-4", 1e-4), ("1e5", 1e5), (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf")),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("y", "y"), ("True", True), ("~", None),
        ("", None), ("2020-01-01", "2020-01-01"), ("=", "="), ("'010'", "010"), ("0b11", "0b11"),
    ],
)  # fmt: skip
def test_scalars_mean_what_people_mean(tmp_path, written, meant):
    found = read(tmp_path, written)
    assert found == meant and type(found) is type(meant)


def test_a_merge_key_gives_what_is_not_given_again(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert load_yaml(path).data["b"] == {"x": 1, "y": 3}


def test_lines_are_found_under_keys_with_dots(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a:\n  b.c:\n    d: 1\n  b: {e: 2}\n")
    where = load_yaml(path).where
    assert where("a.b.c.d") == f"{path}:3: a.b.c.d" and where("a.b.e") == f"{path}:4: a.b.e"
    assert where("a.x") == f"{path}: a.x"


texts = st.text() | st.sampled_from(["010", "1e-4", "08", "1:30", "no", "~", "", "<<", "=", "0o7"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(values)
def test_what_is_written_reads_back_to_the_same(value):
    from aixsim_cli.settings.formats import dump_yaml, parse_yaml

    text = dump_yaml({"key": value})
    assert parse_yaml(text, "c.yaml")[0] == {"key": value}
    # readers of YAML 1.1 see no other value
    assert yaml.safe_load(text) == {"key": value}

"""A generated config is what was asked, whatever the texts in it; nothing but files is replaced."""

import os
import stat
import subprocess

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aixsim_cli.config.budget import Plan
from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.config.recipe import follow
from aixsim_cli.config.render import render, shell_line, write_new, written
from aixsim_cli.errors import UserError
from aixsim_cli.settings.document import load_yaml

PLAN = Plan(1, 2, 3, 4, 5, 6, 7, 8)
# whatever a name may hold, bytes that are no UTF-8 (as lone surrogates) too
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.sampled_from(
    ["x\njob: {dump_folder: here}", "a\r\nb: 1", "\u2028- x", "\x85k: v", "'\"\\", "# no", " x ",
     "a" * 3000 + " " * 3000, "naïve 🙂", "\udc80", "010", "1e-4", "null", "", "---\n", "\x1b[2J"]
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(path=texts, tokenizer=texts, pattern=texts, arch=texts, flavor=texts, dtype=texts)
@example("d/sp ace ü\n.txt", "\n", "\n", "x\n", "y\n", "z\n")
def test_every_text_reads_back_and_injects_nothing(
    tmp_path_factory, path, tokenizer, pattern, arch, flavor, dtype
):
    made = follow(PretrainConfig())
    made.model.name, made.model.flavor, made.model.hf_assets_path = arch, flavor, tokenizer
    made.training.dataset_path, made.training.mixed_precision_param = path, dtype
    made.transform = {"layer_name_to_config": {pattern: None}}
    config = written(made)
    text = render(made, PLAN, f"aixsim generate-cfg {shell_line([path, tokenizer, flavor])}")
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    write_new(file, text, force=True)
    assert load_yaml(file).data == config
    assert yaml.safe_load(file.read_text("utf-8")) == config


def test_a_shell_reads_the_words_of_the_header():
    words = [
        "x\njob: {}",
        "a'b\\\r\n",
        "sp ace ü",
        "",
        "$HOME `ls`",
        "\udc80\udcff1",
        "🙂\u2028",
        "'",
    ]
    line = shell_line(words)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == words


def test_a_link_is_written_through(tmp_path):
    target, link, dangling = tmp_path / "c.yaml", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to("new.yaml")
    with pytest.raises(UserError, match="--force to replace it"):
        write_new(link, "new", force=False)
    write_new(link, "new", force=True)
    write_new(dangling, "new", force=False)
    assert link.is_symlink() and dangling.is_symlink()
    assert target.read_text() == (tmp_path / "new.yaml").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a FIFO; expected a file"),
        (lambda path: path.symlink_to("/dev/null"), "a device; expected a file"),
        (lambda path: path.mkdir(), "a folder; expected a file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links; expected a file"),
    ],
)
def test_what_is_no_file_is_never_replaced(tmp_path, make, said):
    path = tmp_path / "c.yaml"
    make(path)
    before = os.lstat(path)
    with pytest.raises(UserError, match=said):
        write_new(path, "text", force=True)
    assert os.lstat(path) == before and len(list(tmp_path.iterdir())) == 1
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    ("name", "said"), [("file/c.yaml", "cannot be written: "), ("n" * 300, "File name too long")]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, said):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=said):
        write_new(tmp_path / name, "text", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

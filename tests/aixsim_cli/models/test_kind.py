"""What a SOURCE argument names, by looking at the folder."""

import pytest

from aixsim_cli.errors import UserError
from aixsim_cli.models.kind import SourceKind, find_source


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="SOURCE: got an empty text; expected"):
        find_source(source)


def test_the_newest_checkpoint_of_a_run_is_offered(tmp_path):
    for step in ("step-9", "step-10", "step-x", "step-"):
        (tmp_path / "run" / "checkpoint" / step).mkdir(parents=True)
        (tmp_path / "run" / "checkpoint" / step / ".metadata").touch()
    for folder in (tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoint"):
        with pytest.raises(UserError, match=r"did you mean \S*/run/checkpoint/step-10\?"):
            find_source(str(folder))
    assert find_source(str(tmp_path / "run/checkpoint/step-9")) is SourceKind.TITAN


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("checkpoint-4/config.json", r"did you mean \S*/run/checkpoint-4\?"),
        ("adapter_config.json", "a PEFT adapter: expected the model as PEFT's merge_and_unload"),
        (
            ".staged/x",
            "was killed while it saved its model: the same command with --resume_from_ch",
        ),
    ],
)
def test_a_folder_that_nearly_is_one_is_told_apart(tmp_path, inside, said):
    path = tmp_path / "run" / inside
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UserError, match=said):
        find_source(str(tmp_path / "run"))


def test_a_deep_tree_is_not_searched(tmp_path):
    deep = tmp_path / "a/b/c/d/step-3"
    deep.mkdir(parents=True)
    (deep / ".metadata").touch()
    with pytest.raises(UserError, match=r"config\.json\)$"):
        find_source(str(tmp_path))

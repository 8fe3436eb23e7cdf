from pathlib import Path

import pytest

from aixsim_cli.data.cache import cache_folder
from aixsim_cli.errors import UserError


def test_environment_decides_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("AIXSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "aixsim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "aixsim"
    assert cache_folder().is_dir()


def test_unusable_cache_folder_says_what_to_set(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file: .*set AIXSIM_CACHE"):
        cache_folder()

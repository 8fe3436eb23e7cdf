"""The C library: what Python calls is what it takes, and that it may be missing."""

import re
import shutil
import subprocess
from pathlib import Path

import aixsim_kernels
import pytest
from aixsim_kernels.common import library

ROOT = Path(aixsim_kernels.__file__).parent


def test_what_python_calls_is_what_c_takes(extension):
    kinds = {"long": "l", "int": "i", "float": "f", "int64_t": "k", "uint32_t": "u"}
    taken = {}
    source = "\n".join(path.read_text(encoding="utf-8") for path in extension.sources)
    for name, arguments in re.findall(r"^void (aixsim_\w+)\(([^)]*)\)", source, re.MULTILINE):
        words = [argument.split() for argument in arguments.split(",")]
        taken[name] = "".join("p" if "*" in "".join(w) else kinds[w[-2]] for w in words)
    assert taken == library.SIGNATURES
    assert f"aixsim_version = {library.VERSION};" in source


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_library_of_another_version_is_told(tmp_path):
    (tmp_path / "old.c").write_text("const int aixsim_version = 0;", encoding="utf-8")
    out = str(tmp_path / "old.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", out, tmp_path / "old.c"], check=True)
    assert "version 0, expected" in library.opened(out)
    assert "none.so" in library.opened(str(tmp_path / "none.so"))


def test_that_there_is_none_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    library.library.cache_clear()
    with caplog.at_level("INFO", "aixsim"):
        said = [library.library(), library.library()]
    library.library.cache_clear()
    assert said[0] == said[1] == "no C compiler was there when aixsim was installed"
    assert [said[0] in record.getMessage() for record in caplog.records] == [True]


def test_the_library_can_be_read_in_one_sitting(extension):
    files = list(ROOT.rglob("*.[ch]"))
    assert set(extension.sources) < set(files)
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 560

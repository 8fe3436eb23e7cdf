import sys

import pytest

from aixsim_cli.data import corpus
from aixsim_cli.data.corpus import builtin_documents
from aixsim_cli.errors import UserError


def _paragraphs(split):
    return [p for document in builtin_documents(split) for p in document.split("\n\n")]


def test_a_megabyte_or_more_of_mostly_english():
    train, heldout = ("\n".join(builtin_documents(split)) for split in ("train", "heldout"))
    assert len(train) > 1_000_000
    assert len(heldout) > 50_000
    for text in (train, heldout):
        assert sum(c.isalpha() or c.isspace() for c in text) / len(text) > 0.9
        words = text.lower().split()
        # 'the' alone is one word in fifteen of English prose, and in no other thing
        assert words.count("the") / len(words) > 0.04
    assert all(document.strip() for document in builtin_documents("train"))


def test_splits_share_no_paragraph_and_none_comes_twice():
    train, heldout = _paragraphs("train"), _paragraphs("heldout")
    as_keys = [" ".join(p.split()) for p in train + heldout if len(p) >= 80]
    assert len(as_keys) == len(set(as_keys))


def test_second_read_comes_from_the_cache_and_is_the_same(monkeypatch):
    first = builtin_documents("train")
    monkeypatch.setattr(corpus, "_build", lambda: pytest.fail("read the library again"))
    assert builtin_documents("train") == first


def test_a_cache_of_other_content_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path))
    sources = [(f"module m{n}", [f"This is the text of module number {n}."]) for n in range(60)]
    monkeypatch.setattr(corpus, "_sources", lambda: iter(sources))
    whole = builtin_documents("train")
    (cached,) = tmp_path.iterdir()
    text = cached.read_text()
    other = text.replace("module number", "another number")
    assert other != text
    for damage in ("", text[:100], "[]", '{"train": [], "heldout": []}', other, "[" * 100_000):
        cached.write_text(damage)
        assert builtin_documents("train") == whole
    assert [file.name for file in tmp_path.iterdir()] == [cached.name]


def test_a_full_disk_is_told_with_the_place(monkeypatch, tmp_path):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus, "_build", lambda: {"train": ["a"], "heldout": ["b"]})
    monkeypatch.setattr(corpus, "write_atomic", full)
    said = rf"cache {tmp_path}/corpus-\w+\.json: cannot be written: No space .*; set AIXSIM_CACHE"
    with pytest.raises(UserError, match=said):
        builtin_documents("train")


def test_no_module_is_imported_and_damaged_files_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "good.py").write_text(
        'raise RuntimeError("imported")\n\ndef f():\n    """Return the number of good things."""\n'
    )
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_good.py").write_text('"""Check that good things are good."""')
    monkeypatch.setattr(corpus, "_topics", dict)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    found = {name: paragraphs for name, paragraphs in corpus._sources() if paragraphs}
    assert found == {"module good.py": ["Return the number of good things."]}
    assert "good" not in sys.modules


def test_installation_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "_topics", dict)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"empty holds no Python sources; use --dataset local"):
        builtin_documents("train")


def test_code_and_tables_are_not_prose():
    assert corpus._is_prose("Return the number of items in the list.")
    assert not corpus._is_prose(">>> print the words of this list of words")
    assert not corpus._is_prose("x = f(a[0]) + g(b[1]) * 2 == {3: 4}")
    assert not corpus._is_prose("See also.")

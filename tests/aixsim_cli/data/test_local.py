import json

import pyarrow
import pyarrow.parquet
import pytest

from aixsim_cli.data.local import find_files, has_text, read_files
from aixsim_cli.errors import UserError


def _write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=1)


def _texts(path):
    return [row["text"] for row in read_files(find_files(str(path)))]


def test_every_format_gives_its_texts_in_order(tmp_path):
    rows = [{"text": "one", "id": 1}, {"text": "zwei ü", "id": 2}, {"id": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    _write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": ["one", "zwei ü", None]})
    for name in ("a.jsonl", "lines.json", "list.json", "a.parquet"):
        assert _texts(tmp_path / name) == ["one", "zwei ü", None], name
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    assert _texts(tmp_path / "a.txt") == ["one\n\ntwo"]


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83db \\ud83d\\ude42 \\u00fc"}')
    assert _texts(tmp_path / "a.jsonl") == ["a?b 🙂 ü"]


def test_txt_paragraphs_are_grouped_into_documents_of_a_few_kb(tmp_path):
    paragraphs = [f"Paragraph {n}.\n" + "More of the same words. " * 20 for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    documents = _texts(tmp_path / "a.txt")
    assert "\n\n".join(documents).split() == " ".join(paragraphs).split()
    assert all(4096 <= len(d) < 5120 for d in documents[:-1])
    assert all(d.startswith("Paragraph ") for d in documents)


def test_txt_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"line {n} " + "x" * 90 for n in range(2000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = _texts(tmp_path / "a.txt")
    assert len(documents) > 2
    assert "\n".join(documents) == "\n".join(lines)


def test_file_glob_and_folder_find_the_same_files(tmp_path):
    (tmp_path / "sub").mkdir()
    names = ["b.txt", "a.txt", "sub/c.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.md").write_text("ignored in a folder")
    assert find_files(str(tmp_path / "a.txt")) == [str(tmp_path / "a.txt")]
    expected = [str(tmp_path / name) for name in sorted(names)]
    assert find_files(str(tmp_path)) == expected
    assert find_files(str(tmp_path / "**" / "*.txt")) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: holds no text; expected prose"),
        ("a.txt", b" \n\n\t\n", r"a\.txt: holds no text"),
        ("a.txt", b"caf\xe9", r"a\.txt: is not UTF-8"),
        ("a.md", b"text", r"a\.md: cannot read this format; expected \.txt, \.jsonl"),
        ("a.jsonl", b'{"content": "x"}\n', r"a\.jsonl: holds no text; .*field 'text'"),
        ("a.jsonl", b'{"text": 3}\n{"text": ""}\n["x"]', r"a\.jsonl: holds no text"),
        ("a.jsonl", b"\n{text: 3}\n", r"a\.jsonl: .*line 2: .*expected a JSON object a line"),
        ("a.json", b'[{"text": "x"}', r"a\.json: cannot be read"),
        ("a.json", b"[]", r"a\.json: holds no text"),
        ("a.parquet", b"not parquet", r"a\.parquet: cannot be read"),
    ],
)
def test_a_wrong_file_is_named_with_what_would_be_right(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path / name))


def test_parquet_without_the_column_lists_those_it_has(tmp_path):
    _write_parquet(tmp_path / "a.parquet", {"content": ["x"], "url": ["y"]})
    with pytest.raises(UserError, match=r"columns content, url; expected a column 'text'"):
        find_files(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", r"missing\.txt: no such file; expected a file, a glob, or a folder"),
        ("*.txt", r"\*\.txt: no such file; expected a file, a glob, or a folder"),
        ("folder", r"folder: no \.txt, \.jsonl, \.json, \.parquet file in this folder"),
    ],
)
def test_nothing_there_is_an_error(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.csv").write_text("text\nwords\n")
    with pytest.raises(UserError, match=f"dataset_path .*{message}"):
        find_files(str(tmp_path / path))


def test_has_text():
    assert has_text({"text": " x "})
    for row in ({}, {"text": None}, {"text": ""}, {"text": " \n"}, {"text": 3}, {"text": ["x"]}):
        assert not has_text(row), row

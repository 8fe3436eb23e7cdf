import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from aixsim_cli.data.local import find_files, has_text, read_files
from aixsim_cli.errors import UserError

ROW = b'{"text": "x"}\n'


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x\n" * 10_000 + b"caf\xe9\n", "is not UTF-8: line 10001: byte 0xe9 at 20003"),
        ("a.txt", b"x" * 2_000_001 + b"\n\xc3", "is not UTF-8: line 2: byte 0xc3 at 2000002"),
        ("a.jsonl", ROW * 9000 + b'{"text": "\xff"}', "line 9001: byte 0xff at 126010"),
        (
            "a.jsonl",
            ROW + b'\n{"text": }\n',
            "line 3: Expecting value at column 10; expected",
        ),
        ("a.jsonl", ROW + b"[" * 100_000, "cannot be read: line 2: is nested too deeply; expected"),
        ("a.jsonl", ROW + b"9" * 5000, "cannot be read: line 2: Exceeds the limit"),
        ("a.json", b"[" * 100_000, "is nested too deeply; expected rows with a 'text'"),
    ],
)
def test_what_cannot_be_read_is_told_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_files([str(tmp_path / name)]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "first"), [("a.jsonl", "line 4"), ("b.json", "item 2"), ("c.parquet", "row 2")]
)
def test_rows_without_text_are_counted_and_the_first_is_named(tmp_path, caplog, name, first):
    path = tmp_path / name
    rows = [{"text": "x"}, {"id": 3}, {"text": ""}, {"text": None}, {"text": "y"}]
    if name == "c.parquet":
        _write_parquet(path, {"text": [row.get("text") for row in rows]})
    else:
        lines = "\n\n\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
        path.write_text(lines)
    for _ in range(2):
        # what is empty has nothing to lose
        assert _texts(path) == ["x", None, "", None, "y"]
    assert caplog.messages == [
        f"{path}: {first}: text: got None; expected a string; such rows are skipped",
        f"{path}: 2 rows without text are skipped",
    ]


def test_one_rank_speaks_for_all(tmp_path, caplog, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    monkeypatch.setenv("RANK", "1")
    assert _texts(tmp_path / "a.jsonl") == ["x", 3] and not caplog.messages


def test_a_suffix_is_read_in_any_case(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "B.JsonL").write_text('{"text": "two"}')
    assert _texts(tmp_path / "A.TXT") == ["one"]
    assert _texts(tmp_path) == ["one", "two"]


def test_what_a_folder_holds_beside_is_named_once(tmp_path, caplog):
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    for name in ("folder/a.txt", "folder/.b.txt", "folder/sub/b.gz", "folder/.c", "other/c.txt"):
        (tmp_path / name).write_text("words")
    (folder / "linked").symlink_to(other)
    (folder / "loop").symlink_to("loop")
    (folder / "gone.txt").symlink_to("nothing")
    (folder / "d.txt").symlink_to(other / "c.txt")
    for _ in range(2):
        assert find_files(str(folder)) == [str(folder / n) for n in (".b.txt", "a.txt", "d.txt")]
    (said,) = caplog.messages
    assert said.startswith(
        f"dataset_path {folder}: not read, as only .txt, .jsonl, .json, .parquet"
    )
    left_out = [folder / name for name in ("gone.txt", "linked", "loop", "sub/b.gz")]
    assert said.endswith(": " + ", ".join(map(str, left_out)))
    caplog.clear()
    assert find_files(str(folder / "*.txt")) == [str(folder / "a.txt"), str(folder / "d.txt")]
    assert caplog.messages[0].endswith(f": {folder / 'gone.txt'}")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a FIFO"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nothing"), "a link to a file that is not there"),
    ],
)
def test_what_is_no_file_is_named(tmp_path, make, said):
    make(tmp_path / "a.txt")
    with pytest.raises(UserError) as caught:
        find_files(str(tmp_path / "a.txt"))
    assert f"dataset_path {tmp_path}/a.txt: {said}; expected a file, a glob" in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        find_files(str(tmp_path))

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aixsim_cli.data import tokenizer as module
from aixsim_cli.data.corpus import builtin_documents
from aixsim_cli.data.tokenizer import (
    KNOWN_VOCAB_SIZES,
    DocumentEncoder,
    load_tokenizer,
    resolve_tokenizer,
    vocab_size,
)
from aixsim_cli.errors import UserError

TEXTS = ["Hello world.", "", "don't\n\n  naïve 🙂", "a <|endoftext|> inside"]


def test_builtin_has_the_known_size_and_gives_text_back_exactly():
    folder = resolve_tokenizer("builtin")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == vocab_size("builtin") == vocab_size(str(folder)) == 4096
    assert tokenizer.eos_token == "<|endoftext|>"
    encode = DocumentEncoder(tokenizer)
    for text in [*builtin_documents("heldout"), *TEXTS]:
        tokens = encode(text)
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[:-1]) == text
    text = "".join(builtin_documents("heldout"))
    assert len(text) / len(encode(text)) > 3, "characters per token"


def test_builtin_is_trained_the_same_every_time(tmp_path):
    module._train(builtin_documents("train"), tmp_path / "again")
    trained = resolve_tokenizer("builtin") / "tokenizer.json"
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("fault", [lambda t: t[:50], lambda t: t.replace("endoftext", "padding__")])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_cache_of_other_content_is_rebuilt(monkeypatch, name, fault):
    folder = resolve_tokenizer("builtin")
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    monkeypatch.setattr(module, "_train", lambda texts, to: shutil.copytree(whole, to))
    file = folder / name
    file.write_text(fault(file.read_text()))
    assert file.read_bytes() != (whole / name).read_bytes()
    assert resolve_tokenizer("builtin") == folder
    assert file.read_bytes() == (whole / name).read_bytes()
    shutil.rmtree(folder)
    assert resolve_tokenizer("builtin") == folder and file.is_file()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left (os error 28)")]
)
def test_a_full_disk_is_told_with_the_place(monkeypatch, tmp_path, shared_cache, error):
    builtin_documents("train")
    for corpus in shared_cache.glob("corpus-*.json"):
        shutil.copy(corpus, tmp_path)
    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path))

    def fail(texts, folder):
        raise error

    monkeypatch.setattr(module, "_train", fail)
    with pytest.raises(
        UserError, match=rf"cache {tmp_path}/tokenizer-\w+: cannot be written: No sp"
    ):
        resolve_tokenizer("builtin")
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]


def test_two_processes_that_start_at_once_train_it_once(tmp_path, monkeypatch, shared_cache):
    builtin_documents("train")
    for corpus in shared_cache.glob("corpus-*.json"):
        shutil.copy(corpus, tmp_path)
    monkeypatch.setenv("AIXSIM_CACHE", str(tmp_path))
    program = """
import os, pathlib, time
from aixsim_cli.data import tokenizer
train, log = tokenizer._train, pathlib.Path(os.environ["AIXSIM_CACHE"]) / "log"
def counted(texts, folder):
    with log.open("a") as stream:
        stream.write("trained;")
    train(texts, folder)
    time.sleep(1)  # the other one is surely waiting by now
tokenizer._train = counted
print(tokenizer.resolve_tokenizer("builtin"))
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    assert all(rank.returncode == 0 for rank in ranks)
    assert (tmp_path / "log").read_text() == "trained;"
    (folder,) = folders
    assert vocab_size(folder) == 4096
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("tmp")], "left over"


def test_a_folder_is_itself(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    assert resolve_tokenizer(str(tmp_path)) == tmp_path
    assert vocab_size(str(tmp_path)) == len(byte_tokenizer) == 257


def test_tokens_that_only_the_config_adds_are_counted(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["pad_token"] = {"content": "<pad>", "__type": "AddedToken"}
    config["bos_token"] = "<s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    config["extra_special_tokens"] = ["the", "and"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert vocab_size(str(tmp_path)) == 261


def test_a_unigram_vocabulary_is_counted(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")
    fast.save_pretrained(tmp_path)
    assert vocab_size(str(tmp_path)) == 4


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_damaged_files_are_an_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        vocab_size(str(tmp_path))


def test_wrong_paths_say_what_would_be_right(tmp_path):
    with pytest.raises(
        UserError, match=r"tokenizer\.json is missing; expected tokenizer\.json and"
    ):
        resolve_tokenizer(str(tmp_path))
    for path in (str(tmp_path / "absent"), "./absent", "a/b/c", "~nobody/here"):
        with pytest.raises(UserError, match=r"no such folder; expected a folder with tokenizer"):
            resolve_tokenizer(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"no such folder"):
        resolve_tokenizer(str(tmp_path / "file"))


def test_hub_name_is_downloaded_tokenizer_files_only(monkeypatch, tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_tokenizer("owner/name") == tmp_path
    assert asked == {
        "owner/name": ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    }
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer owner/name: tokenizer\.json is missing"):
        resolve_tokenizer("owner/name")


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError, ConnectionError, ValueError])
def test_hub_out_of_reach_offers_builtin(monkeypatch, failure):
    def snapshot_download(name, allow_patterns):
        raise failure("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"cannot be reached .*use --tokenizer-path builtin"):
        resolve_tokenizer("owner/name")


def test_known_sizes_need_no_heavy_import_no_files_and_no_network():
    program = f"""
import sys
from aixsim_cli.data import sources, tokenizer
for name, size in {KNOWN_VOCAB_SIZES!r}.items():
    assert tokenizer.vocab_size(name) == size
heavy = {{"torch", "transformers", "datasets", "tokenizers", "huggingface_hub", "numpy"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def _with_bos_token(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})


def _by_post_processor(tokenizer):
    _with_bos_token(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )


@pytest.mark.parametrize(
    ("change", "config", "opens_with_bos"),
    [
        (lambda tokenizer: None, {}, False),
        (_with_bos_token, {}, False),
        (_with_bos_token, {"add_bos_token": False}, False),
        (_with_bos_token, {"add_bos_token": True}, False),
        (_by_post_processor, {}, True),
        (_by_post_processor, {"add_bos_token": False}, True),
    ],
)
def test_documents_end_with_eos_and_open_with_bos_where_tokenizer_json_says_so(
    tmp_path, byte_tokenizer, change, config, opens_with_bos
):
    byte_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved | config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encode = DocumentEncoder(tokenizer)
    for text in TEXTS:
        tokens = encode(text)
        assert tokens[-1] == tokenizer.eos_token_id
        body = tokens[:-1]
        if opens_with_bos:
            assert body.pop(0) == tokenizer.bos_token_id
        assert body == tokenizer.encode(text, add_special_tokens=False)


def test_long_documents_are_never_cut(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    model = json.loads(file.read_text())
    model["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(model))
    assert len(DocumentEncoder(load_tokenizer(tmp_path))("x" * 50)) == 51


def test_documents_are_never_padded(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    model = json.loads(file.read_text())
    model["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 32, "pad_id": 7,
        "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    file.write_text(json.dumps(model))
    assert len(DocumentEncoder(load_tokenizer(tmp_path))("x" * 50)) == 51


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"model_max_length": 8}, True),
        ({"clean_up_tokenization_spaces": True}, True),
        ({"split_special_tokens": True}, False),
        ({"extra_special_tokens": ["the"]}, False),
        ({"bos_token": "<s>"}, False),
    ],
)
def test_a_digest_tells_what_makes_other_tokens(tmp_path, byte_tokenizer, change, is_same):
    byte_tokenizer.save_pretrained(tmp_path)
    before = DocumentEncoder(load_tokenizer(tmp_path)).digest
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert (DocumentEncoder(load_tokenizer(tmp_path)).digest == before) == is_same


def test_tokenizer_without_end_of_text_is_refused(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"expected 'eos_token' in tokenizer_config\.json"):
        DocumentEncoder(load_tokenizer(tmp_path))


def test_a_document_that_takes_long_is_said(byte_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(module, "_LONG_DOCUMENT", 100)
    encode = DocumentEncoder(byte_tokenizer)
    assert len(encode("x" * 100)) == 101 and not caplog.messages
    assert len(encode("x" * 1001)) == 1002
    assert caplog.messages == [
        "a document of 1,001 characters becomes tokens as a whole: a second each half million"
    ]

import copy
import itertools
import logging
import pickle

import pytest
import torch
from datasets import Dataset, IterableDataset

from aixsim_cli.data.sources import HubSource, articles, open_source
from aixsim_cli.data.tokenizer import DocumentEncoder, load_tokenizer, resolve_tokenizer
from aixsim_cli.data.windows import TextDataset, heldout_windows
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.pretrain.dataloader import build_dataloader

TEXTS = [f"document {n} " + "abcdefg " * (n % 7) for n in range(23)]


def _map_style(tmp_path):
    return Dataset.from_dict({"text": TEXTS})


def _stream(tmp_path):
    return _map_style(tmp_path).to_iterable_dataset(num_shards=1)


def _sharded_stream(tmp_path):
    return _map_style(tmp_path).to_iterable_dataset(num_shards=4)


def _partitioned_stream(tmp_path):
    source = HubSource("owner/name", "config", regroup=articles)
    titled = [f" = {text} = \n" for text in TEXTS]
    data = Dataset.from_dict({"text": titled}).to_iterable_dataset(num_shards=2)
    return data.filter(lambda row: "3" not in row["text"]).map(source.regroup, batched=True)


def _local_files(tmp_path):
    for start in range(0, len(TEXTS), 8):
        rows = Dataset.from_dict({"text": TEXTS[start : start + 8]})
        rows.to_parquet(tmp_path / f"{start:02}.parquet")
    return open_source("local", str(tmp_path), "train")


ALL_KINDS = [_map_style, _stream, _sharded_stream, _partitioned_stream, _local_files]


def _dataset(data, tokenizer, seq_len=16, **options):
    return TextDataset(data, tokenizer, name="test", seq_len=seq_len, **options)


def _take(iterator, count):
    return [(x["input"].tolist(), y.tolist()) for x, y in itertools.islice(iterator, count)]


def _documents(windows, tokenizer):
    """The whole documents that a pass of two-token windows gives."""
    tokens = [t for x, y in windows for t in (*x["input"].tolist(), *y.tolist())]
    text = tokenizer.decode(tokens)
    return [part for part in text.split(tokenizer.eos_token) if part]


def test_windows_are_the_tokens_of_the_documents_end_to_end(byte_tokenizer):
    encode = DocumentEncoder(byte_tokenizer)
    expected = [token for text in TEXTS for token in encode(text)]
    windows = list(_dataset(_map_style(None), byte_tokenizer, infinite=False))
    for index, (inputs, labels) in enumerate(windows):
        assert inputs.keys() == {"input"}
        assert inputs["input"].shape == labels.shape == (16,)
        assert inputs["input"].dtype == labels.dtype == torch.int64
        window = expected[index * 17 : (index + 1) * 17]
        assert inputs["input"].tolist() == window[:-1]
        assert labels.tolist() == window[1:]
    assert len(windows) == len(expected) // 17


def test_same_batches_as_torchtitans_own_data_set(monkeypatch):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    config = DatasetConfig(
        path="none", loader=_stream, sample_processor=lambda sample: sample["text"]
    )
    monkeypatch.setitem(text_datasets.DATASETS, "ours", config)
    tokenizer = HuggingFaceTokenizer(str(resolve_tokenizer("builtin")))
    own = load_tokenizer(resolve_tokenizer("builtin"))
    for rank in range(2):
        theirs = text_datasets.HuggingFaceTextDataset("ours", None, tokenizer, 8, rank, 2, True)
        ours = _dataset(_stream(None), own, 8, dp_rank=rank, dp_world_size=2)
        assert _take(iter(ours), 60) == _take(iter(theirs), 60)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3)])
def test_resume_is_exact_in_every_epoch_and_twice_in_a_row(
    tmp_path, byte_tokenizer, kind, rank, world
):
    data = kind(tmp_path)

    def fresh():
        return _dataset(data, byte_tokenizer, dp_rank=rank, dp_world_size=world)

    straight = fresh()
    windows = iter(straight)
    reference = _take(windows, 160)
    assert straight.state_dict()["epoch"] >= 3, "the test must pass the end several times"
    for first, second in ((0, 3), (1, 1), (5, 40), (37, 1), (60, 30), (100, 20), (101, 33)):
        state, taken = None, 0
        for count in (first, second, 160 - first - second):
            dataset = fresh()
            if state is not None:
                dataset.load_state_dict(pickle.loads(state))
                assert dataset.state_dict() == pickle.loads(state), "changed by loading alone"
            windows = iter(dataset)
            where = f"{taken} to {taken + count} of {first}, {second}"
            assert _take(windows, count) == reference[taken : taken + count], where
            taken += count
            state = pickle.dumps(dataset.state_dict())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_new_iterator_goes_on_where_the_last_one_stopped(tmp_path, byte_tokenizer, kind):
    data = kind(tmp_path)
    reference = _take(iter(_dataset(data, byte_tokenizer)), 100)
    dataset = _dataset(data, byte_tokenizer)
    pieces = [_take(iter(dataset), count) for count in (10, 50, 40)]
    assert [window for piece in pieces for window in piece] == reference


def test_a_state_is_not_changed_by_what_comes_after_it(byte_tokenizer):
    dataset = _dataset(_stream(None), byte_tokenizer)
    windows = iter(dataset)
    _take(windows, 5)
    state = dataset.state_dict()
    before = copy.deepcopy(state)
    _take(windows, 50)
    other = _dataset(_stream(None), byte_tokenizer)
    other.load_state_dict(state)
    _take(iter(other), 50)
    assert state == before


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_ranks_share_the_documents_without_overlap_or_loss(tmp_path, byte_tokenizer, kind, world):
    data = kind(tmp_path)
    everything = _documents(_dataset(data, byte_tokenizer, 1, infinite=False), byte_tokenizer)
    shares = [
        _documents(
            _dataset(data, byte_tokenizer, 1, dp_rank=r, dp_world_size=world, infinite=False),
            byte_tokenizer,
        )
        for r in range(world)
    ]
    assert all(shares)
    assert sorted(itertools.chain(*shares)) == sorted(everything)


@pytest.mark.parametrize("kind", [_map_style, _stream, _local_files])
def test_more_ranks_than_documents_starve_nobody(tmp_path, byte_tokenizer, kind, monkeypatch):
    monkeypatch.setitem(globals(), "TEXTS", ["only one.", "and another."])
    data = kind(tmp_path)
    for rank in range(5):
        dataset = _dataset(data, byte_tokenizer, dp_rank=rank, dp_world_size=5)
        reference = _take(iter(dataset), 20)
        assert len(reference) == 20, f"rank {rank}"
        again = _dataset(data, byte_tokenizer, dp_rank=rank, dp_world_size=5)
        _take(iter(again), 7)
        resumed = _dataset(data, byte_tokenizer, dp_rank=rank, dp_world_size=5)
        resumed.load_state_dict(again.state_dict())
        assert _take(iter(resumed), 13) == reference[7:], f"rank {rank}"


def test_a_share_without_text_reads_the_other_shares(byte_tokenizer):
    data = Dataset.from_dict({"text": ["", "", "", "some text", "more text", ""]})
    for rank in range(2):
        dataset = _dataset(data, byte_tokenizer, 4, dp_rank=rank, dp_world_size=2)
        assert len(_take(iter(dataset), 10)) == 10, f"rank {rank}"


def test_data_shorter_than_a_window_wraps_around_to_fill_it(byte_tokenizer):
    data = Dataset.from_dict({"text": ["abc"]})
    ((inputs, labels),) = _take(iter(_dataset(data, byte_tokenizer, 9)), 1)
    text = byte_tokenizer.decode([*inputs, labels[-1]])
    assert text == "abc<|endoftext|>abc<|endoftext|>ab"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize("texts", [[], ["", None, "  \n"]])
@pytest.mark.parametrize("as_stream", [False, True])
def test_data_without_any_text_is_an_error_not_an_endless_loop(
    byte_tokenizer, texts, infinite, world, as_stream
):
    def rows():
        yield from ({"text": text} for text in texts)

    data = IterableDataset.from_generator(rows) if as_stream else Dataset.from_dict({"text": texts})
    for rank in range(world):
        dataset = _dataset(
            data, byte_tokenizer, dp_rank=rank, dp_world_size=world, infinite=infinite
        )
        with pytest.raises(UserError, match=r"dataset test: not one row has text; expected"):
            next(iter(dataset))


def test_rows_without_text_are_skipped_and_counted_and_the_wrap_is_told_once(
    byte_tokenizer, caplog
):
    def rows():
        yield {"text": "a"}
        yield from ({"text": value} for value in (None, "", " \n ", 3, ["x"]))
        yield {"other": "b"}
        yield {"text": "c"}

    data = IterableDataset.from_generator(rows)
    dataset = _dataset(data, byte_tokenizer, 1, infinite=False)
    assert _documents(dataset, byte_tokenizer) == ["a", "c"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        _take(iter(_dataset(data, byte_tokenizer, 1)), 30)
    (record,) = caplog.records
    assert "2 documents, 6 rows without text skipped; it starts again" in record.getMessage()


def test_a_finite_data_set_gives_the_same_pass_again(byte_tokenizer):
    for kind in (_map_style, _stream):
        dataset = _dataset(kind(None), byte_tokenizer, infinite=False)
        assert _take(iter(dataset), 1000) == _take(iter(dataset), 1000) != []


def test_a_stream_that_breaks_is_a_run_error_that_says_where(byte_tokenizer):
    def rows():
        yield from ({"text": text} for text in TEXTS[:3])
        raise ConnectionError("the hub hung up")

    dataset = _dataset(IterableDataset.from_generator(rows), byte_tokenizer, 8)
    with pytest.raises(RunError, match=r"dataset test: .* after row 3 of pass 1 .*the hub hung up"):
        list(dataset)


def test_a_local_file_that_goes_bad_midway_is_named(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut off')
    dataset = _dataset(open_source("local", str(tmp_path), "train"), byte_tokenizer)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: line 2"):
        list(dataset)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_dataloader_batches_shards_and_resumes(tmp_path, byte_tokenizer, num_workers):
    _local_files(tmp_path)

    def fresh(rank):
        return build_dataloader(
            dataset="local",
            dataset_path=str(tmp_path),
            split="train",
            tokenizer=byte_tokenizer,
            seq_len=16,
            batch_size=3,
            dp_rank=rank,
            dp_world_size=2,
            infinite=True,
            num_workers=num_workers,
            persistent_workers=False,
            pin_memory=False,
            prefetch_factor=None,
        )

    assert _take(iter(fresh(0)), 3) != _take(iter(fresh(1)), 3)
    reference = _take(iter(fresh(1)), 24)
    assert torch.tensor(reference[0][0]).shape == (3, 16)
    loader, taken = fresh(1), 0
    for count in (13, 4, 7):
        assert _take(iter(loader), count) == reference[taken : taken + count]
        taken += count
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        loader = fresh(1)
        loader.load_state_dict(state)


def test_more_than_one_worker_is_refused(byte_tokenizer):
    with pytest.raises(UserError, match=r"num_workers: got 2; expected 0 or 1"):
        build_dataloader(
            dataset="builtin",
            dataset_path=None,
            split="train",
            tokenizer=byte_tokenizer,
            seq_len=16,
            batch_size=3,
            dp_rank=0,
            dp_world_size=1,
            infinite=True,
            num_workers=2,
        )


@pytest.mark.parametrize("seq_len", [1, 2, 7, 60, 61, 62, 63, 1000])
def test_heldout_windows_predict_every_token_but_the_first_once(byte_tokenizer, seq_len):
    texts = ["one document", "", None, "another, somewhat longer document", "   ", "the last one"]
    encode = DocumentEncoder(byte_tokenizer)
    stream = [token for text in texts if text and text.strip() for token in encode(text)]
    assert len(stream) == 60
    windows = list(heldout_windows(texts, byte_tokenizer, seq_len))
    assert torch.cat([inputs for inputs, _ in windows]).tolist() == stream[:-1]
    assert torch.cat([labels for _, labels in windows]).tolist() == stream[1:]
    assert all(x.shape == y.shape and x.dtype == y.dtype == torch.int64 for x, y in windows)
    assert all(len(inputs) == seq_len for inputs, _ in windows[:-1])
    assert 1 <= len(windows[-1][0]) <= seq_len


def test_heldout_windows_of_nothing_are_none(byte_tokenizer):
    assert list(heldout_windows([], byte_tokenizer, 8)) == []
    assert list(heldout_windows(["", None], byte_tokenizer, 8)) == []

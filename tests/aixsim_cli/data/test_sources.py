import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from aixsim_cli.data import sources
from aixsim_cli.data.corpus import builtin_documents
from aixsim_cli.data.sources import SOURCES, articles, open_source
from aixsim_cli.errors import UserError

HUB_SOURCES = sorted(set(SOURCES) - {"builtin", "local"})


@pytest.fixture
def hub(monkeypatch):
    """A hub that has every data set, and remembers what was asked of it."""
    asked = []

    def load_dataset(repo, config, **options):
        asked.append((repo, config, options))
        texts = [f"text {n} of the {options['split']} split" for n in range(5000)]
        data = datasets.Dataset.from_dict({"text": texts, "id": list(range(5000))})
        return data.to_iterable_dataset(num_shards=2) if options["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def _texts(name, split, path=None):
    return [row["text"] for row in open_source(name, path, split)]


def test_builtin_and_local_rows(tmp_path):
    for split in ("train", "heldout"):
        assert _texts("builtin", split) == builtin_documents(split)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    for split in ("train", "heldout"):
        assert _texts("local", split, str(tmp_path / "a.jsonl")) == ["one", None, "two"]


def test_several_local_files_are_shards_of_one_stream(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    data = open_source("local", str(tmp_path), "train")
    assert isinstance(data, datasets.IterableDataset)
    assert data.num_shards == 3
    assert [row["text"] for row in data] == ["a", "b", "c"]


@pytest.mark.parametrize("name", HUB_SOURCES)
def test_hub_sources_are_streamed_unless_told_not_to(hub, monkeypatch, name):
    assert isinstance(open_source(name, None, "train"), datasets.IterableDataset)
    monkeypatch.setenv("STREAM_HF_DATA", "0")
    assert isinstance(open_source(name, None, "train"), datasets.Dataset)
    for _, _, options in hub:
        assert set(options) == {"split", "streaming"}, "no remote code, nothing else"
    monkeypatch.setenv("STREAM_HF_DATA", "yes")
    with pytest.raises(UserError, match=r"STREAM_HF_DATA: got 'yes'; expected 1 .* or 0"):
        open_source(name, None, "train")


@pytest.mark.parametrize("streaming", ["0", "1"])
@pytest.mark.parametrize("name", ["fineweb", "fineweb-edu"])
def test_fineweb_parts_have_no_text_in_common_and_leave_none_out(hub, monkeypatch, name, streaming):
    monkeypatch.setenv("STREAM_HF_DATA", streaming)
    train, heldout = _texts(name, "train"), _texts(name, "heldout")
    assert set(train).isdisjoint(heldout)
    assert len(train) + len(heldout) == 5000
    assert 20 <= len(heldout) <= 100, "about one in a hundred"
    assert {options["split"] for _, _, options in hub} == {"train"}


@pytest.mark.parametrize("name", ["c4", "wikitext"])
def test_hub_validation_split_is_held_out(hub, name):
    for split, asked in (("train", "train"), ("heldout", "validation")):
        assert f"of the {asked} split" in next(iter(open_source(name, None, split)))["text"]
        assert hub[-1][2]["split"] == asked


def test_wikitext_lines_become_articles():
    lines = ["", " = First = \n", "", " It begins . \n", " = = Part = = \n", " More . \n"]
    lines += [" = B = \n", " Second . \n"]
    data = datasets.Dataset.from_dict({"text": lines}).map(articles, batched=True)
    first = " = First = \n It begins . \n = = Part = = \n More . \n"
    assert data["text"] == ["", first, " = B = \n Second . \n"]


@pytest.mark.parametrize("failure", [ConnectionError, DatasetNotFoundError])
def test_hub_out_of_reach_offers_data_that_needs_no_hub(monkeypatch, failure):
    def load_dataset(*args, **options):
        raise failure("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"allenai/c4 .*Couldn't reach.*--dataset builtin"):
        open_source("c4", None, "train")


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("fineweb_edu", None, r"dataset: got 'fineweb_edu'; did you mean 'fineweb-edu'\?"),
        ("the-pile-of-books", None, r"expected one of: builtin, c4, fineweb"),
        ("local", None, r"dataset_path: missing"),
        ("c4", "some/folder", r"dataset_path: got 'some/folder' with dataset 'c4'; only .*'local'"),
        ("builtin", "x.txt", r"only dataset 'local' has a path"),
    ],
)
def test_wrong_name_or_path(name, path, message):
    with pytest.raises(UserError, match=message):
        open_source(name, path, "train")


def test_missing_text_in_a_hub_row_is_left_for_the_loader_to_skip():
    assert sources._is_heldout({"text": None}) != sources._is_trained({"text": None})

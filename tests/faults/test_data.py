"""A source that drops connections is read again from the same row; ranks that change share anew."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, load_dataset

from aixsim_cli.data.sources import HubSource, articles
from aixsim_cli.data.tokenizer import load_tokenizer, resolve_tokenizer
from aixsim_cli.data.windows import TextDataset
from aixsim_cli.errors import RunError
from aixsim_cli.pretrain.dataloader import divide_anew

ROWS = [{"text": f" = document {n} = \n" + "words of it " * 20} for n in range(3000)]
BODY = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Flaky(BaseHTTPRequestHandler):
    """Serves BODY; breaks the connection half way in every GET while `server.breaks` lasts."""

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        broken = self.server.breaks > 0
        self.server.breaks -= 1
        self.answer(BODY[: len(BODY) * 2 // 3] if broken else BODY)

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as http:
        http.breaks = 0
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield http
        http.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """datasets tries again by itself, 20 times after 5 s each; our own trying is tested here."""
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def waits(monkeypatch):
    """The pauses that would have been made, in seconds."""
    made = []
    monkeypatch.setattr("aixsim_cli.data.windows.time", SimpleNamespace(sleep=made.append))
    return made


@pytest.fixture(scope="module")
def tokenizer():
    resolve_tokenizer("builtin")
    return load_tokenizer(resolve_tokenizer("builtin"))


def windows(data, tokenizer, **options):
    data = TextDataset(data, tokenizer, name="http", seq_len=256, infinite=False, **options)
    return [x["input"].tolist() for x, _ in data]


def stream(server, kind="plain"):
    url = f"http://127.0.0.1:{server.server_port}/data.jsonl"
    data = load_dataset("json", data_files=url, split="train", streaming=True)
    if kind == "regrouped":
        # what the hub's wikitext goes through: a filter, and a map of batches
        source = HubSource("owner/name", "config", regroup=articles)
        data = data.filter(lambda row: "13" not in row["text"]).map(source.regroup, batched=True)
    return data


@pytest.mark.parametrize("kind", ["plain", "regrouped"])
def test_dropped_connections_lose_and_repeat_nothing(server, tokenizer, waits, caplog, kind):
    expected = windows(stream(server, kind), tokenizer)
    data = stream(server, kind)
    server.breaks = 3
    assert windows(data, tokenizer, retries=4) == expected
    assert waits == [1, 2, 4][: len(waits)] and waits
    assert "trying again in 1 s (1 of 4)" in caplog.text


def test_a_source_that_stays_away_ends_the_run(server, tokenizer, waits):
    data = stream(server)
    server.breaks = 1000
    with pytest.raises(RunError, match=r"reading failed after row \d+ of pass 1.*tried 4 times"):
        windows(data, tokenizer, retries=3)
    assert waits == [1, 2, 4]


def rows_read(data, tokenizer, positions, world, count):
    """What `world` ranks read for `count` windows each, going on from `positions`; where to."""
    read, after = [], []
    for rank in range(world):
        part = TextDataset(
            data, tokenizer, name="rows", seq_len=7, dp_rank=rank, dp_world_size=world
        )
        if positions is not None:
            same = len(positions) == world
            part.load_state_dict(positions[rank] if same else divide_anew(positions, rank, world))
        encode = part._encode

        def spy(text, encode=encode):
            read.append(int(text.split()[1]))
            return encode(text)

        part._encode = spy
        for _ in zip(range(count), part, strict=False):
            pass
        after.append(part.state_dict())
    return read, after


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_other_ranks_go_on_with_the_rows_that_follow(tokenizer, streamed, worlds):
    data = Dataset.from_dict({"text": [f"row {n}" for n in range(400)]})
    if streamed:
        data = data.to_iterable_dataset()
    before, positions = rows_read(data, tokenizer, None, worlds[0], 48 // worlds[0])
    for _ in range(2):  # the second time of as many ranks, which is exact
        more, positions = rows_read(data, tokenizer, positions, worlds[1], 48 // worlds[1])
        before += more
    # of the rows up to the last one, as good as all were read, and as good as none twice
    assert max(before) > 150
    assert max(before) + 1 - len(set(before)) <= max(worlds)
    assert len(before) - len(set(before)) <= max(worlds)


def test_tokens_that_were_read_are_handed_on():
    positions = [
        {"token_buffer": [n], "epoch": 1, "rows": 10 + n, "documents": 9, "reads_all": False}
        for n in range(4)
    ]
    positions[3] |= {"epoch": 0, "rows": 500}
    shares = [divide_anew(positions, rank, 2) for rank in range(2)]
    assert [share["token_buffer"] for share in shares] == [[0, 2], [1, 3]]
    # 33 rows of the newest pass: those behind them are dealt in turn
    assert [share["rows"] for share in shares] == [17, 16]
    assert all(share["epoch"] == 1 and not share["reads_all"] for share in shares)

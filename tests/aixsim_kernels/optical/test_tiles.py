"""Launch parameters come from the table, whatever the device."""

import json

import pytest
import torch
from aixsim_kernels.optical import tiles

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_an_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.parametrize("device", tiles.table())
def test_the_table_is_complete(device):
    linear, attention = tiles.table()[device]["linear"], tiles.table()[device]["attention"]
    assert set(linear) == {"large", "small", "exact"}
    assert set(attention) == {"64", "128", "256", "exact"}
    for tile in linear.values():
        tiles.LinearTile(*tile)
    for passes in attention.values():
        for tile in tiles.AttentionTiles(**passes):
            # neighbouring columns share a word of noise, and a product takes 16
            assert tiles.AttentionTile(*tile).n % 16 == 0


def test_classes_of_shapes():
    assert tiles.linear_class(98304, 1536, exact=False) == "large"
    assert tiles.linear_class(1, 4096, exact=False) == "small"
    assert tiles.linear_class(1, 4096, exact=True) == "exact"
    assert [tiles.attention_class(d, exact=False) for d in (1, 64, 65, 256)] == [
        "64", "64", "128", "256",
    ]  # fmt: skip
    assert [tiles.padded(d) for d in (1, 16, 65)] == [16, 16, 128]
    with pytest.raises(ValueError, match="257: at most 256"):
        tiles.attention_class(257, exact=True)


def test_by_device(on_an_h100, monkeypatch):
    assert tiles.linear_tile(CUDA, 4096, 4096, exact=False).stages == 4
    assert tiles.linear_tile(CPU, 4096, 4096, exact=False).stages == 3
    assert tiles.attention_tiles(CUDA, 80, exact=False).values.n == 32
    # what is not listed runs with what fits everywhere
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert tiles.linear_tile(CUDA, 4096, 4096, exact=False).stages == 3


def test_what_is_written_is_read(tmp_path, monkeypatch):
    before = tiles.TABLE.read_text()
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tiles.write(tiles.table())
    assert tiles.TABLE.read_text() == before
    assert json.loads(before) == tiles.table()

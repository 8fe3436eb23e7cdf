"""The estimate of a step on a GPU counts what the kernels' tests hold."""

import pytest


@pytest.fixture
def estimate(script):
    return script("estimate_step")


def test_its_counts_are_those_that_tests_hold(estimate):
    from aixsim_kernels.optical.tiles import table

    from tests.aixsim_cli.transforms.test_launches import ATTENTION, LINEAR, PRODUCTS
    from tests.aixsim_kernels.optical.attention.test_triton import INSTRUCTIONS
    from tests.aixsim_kernels.optical.linear.test_triton import EPILOGUE

    assert estimate.NOW.epilogue == EPILOGUE[1]
    assert estimate.NOW.launches == (LINEAR - PRODUCTS, ATTENTION)
    tiles = table()["9.0"]["attention"]["64"]
    for name, *instructions, _, queries, keys in estimate.NOW.passes:
        assert tuple(instructions) == INSTRUCTIONS[name][64]
        assert [queries, keys] == tiles[name][:2]


def test_tiles_of_a_causal_head(estimate):
    """Against a count of the keys that each query sees."""
    for queries, keys in ((128, 64), (32, 128), (64, 32)):
        whole = some = 0
        for first in range(0, estimate.LENGTH, queries):
            for start in range(0, first + queries, keys):
                if start + keys - 1 <= first:
                    whole += 1
                else:
                    some += 1
        assert estimate.tiles(queries, keys) == (whole, some)


def test_a_step_of_digital_training_has_no_kernels_of_ours(estimate):
    flavor = estimate.FLAVORS["aixsim"]["60M"]
    digital, now = estimate.step(flavor, None), estimate.step(flavor, estimate.NOW)
    assert digital["launches"] == 0 < now["launches"]
    assert digital["the rest"] == now["the rest"]
    assert all(now[part] >= seconds for part, seconds in digital.items())

"""docs/architectures.md is what a walk over every text model type finds, and none of it is wrong.

The quick half walks some types, the long half all of them.
"""

import os

import pytest
import transformers
from torch import nn

from aixsim_cli.models.hf import attention

from .walk import PAGE, TOLERANCE, Row, entries, walk

CHUNK = 20
QUICK = {
    ("deepseek_v32", "causal"),
    ("gemma3_text", "causal"),
    ("gpt_oss", "causal"),
    ("llama", "causal"),
    ("mamba", "causal"),
    ("bert", "masked"),
    ("t5", "seq2seq"),
}
RESULTS = {"equal", "equal, linears only", "digital", "refused", "not built"}


def page_rows():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {tuple(cells[:2]): line_cells(cells) for cells in rows[1:]}


def line_cells(cells):
    """Without the measured difference, which another machine rounds otherwise."""
    return [cell.strip() for index, cell in enumerate(cells) if index != 4]


def page_is_of_this_transformers():
    return f"transformers {transformers.__version__} " in PAGE.read_text(encoding="utf-8")


def holds(row):
    """No wrong result; and what the page says, where it is of this transformers."""
    assert row.result in RESULTS, row
    if row.result.startswith("equal"):
        assert row.difference <= TOLERANCE
    if row.attentions:
        assert (row.ignoring <= 3 * TOLERANCE) == ("no proof" in row.digital)
    if page_is_of_this_transformers():
        cells = " | ".join(row.cells()).strip("| ").split(" | ")
        assert page_rows()[row.model_type, row.kind] == line_cells(cells)


def test_the_page_has_every_type_and_no_unexplained_result():
    if not page_is_of_this_transformers():
        pytest.skip(f"{PAGE.name} is of another transformers than {transformers.__version__}")
    rows = page_rows()
    assert set(rows) == set(entries())
    assert {cells[2] for cells in rows.values()} <= RESULTS
    assert sum(cells[2] == "equal" for cells in rows.values()) > 150
    assert sum("no proof" in cells[-1] for cells in rows.values()) <= 1


def test_results_are_judged_under_another_transformers_too(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "0.1")
    holds(Row("of_tomorrow", "causal", "equal", linears=2, difference=TOLERANCE))
    for wrong in (
        Row("llama", "causal", "DIFFERENT"),
        Row("llama", "causal", "UNSAID"),
        Row("llama", "causal", "equal", linears=2, difference=2 * TOLERANCE),
    ):
        with pytest.raises(AssertionError):
            holds(wrong)


@pytest.mark.parametrize(("model_type", "kind"), sorted(QUICK))
def test_the_page_holds(model_type, kind):
    holds(walk(model_type, kind))


@pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, len(entries()), CHUNK))
def test_the_whole_page_holds(first):
    for model_type, kind in entries()[first : first + CHUNK]:
        holds(walk(model_type, kind))


# the walk can fail


def test_a_position_bias_that_is_dropped_is_found(monkeypatch):
    forward = attention.simulated_attention_forward

    def without(*arguments, position_bias=None, **keywords):
        return forward(*arguments, **keywords)

    monkeypatch.setattr(attention, "simulated_attention_forward", without)
    assert walk("t5", "seq2seq").result == "DIFFERENT"


def test_a_static_cache_whose_slots_are_seen_is_found(monkeypatch):
    forward = attention.simulated_attention_forward

    def lower_right(module, query, key, value, mask, **keywords):
        keywords["is_causal"] = False if key.shape[2] > query.shape[2] else None
        return forward(module, query, key, value, mask, **keywords)

    monkeypatch.setattr(attention, "simulated_attention_forward", lower_right)
    assert walk("llama", "causal").result == "DIFFERENT"


def test_an_attention_that_is_digital_and_not_said_is_found(monkeypatch):
    def digital(module, *arguments, **keywords):
        keywords.pop("position_bias", None)
        q, k, v, mask = arguments
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=keywords["scaling"], enable_gqa=True,
            is_causal=mask is None and q.shape[2] > 1,
        )  # fmt: skip
        return out.transpose(1, 2), None

    monkeypatch.setattr(attention, "simulated_attention_forward", digital)
    assert walk("llama", "causal").result == "UNSAID"

"""What becomes of every text model type of the installed transformers when it is simulated.

    python tests/aixsim_cli/models/hf/walk.py [--page ROWS] [TYPE ...]

A small model of the type runs digitally and with 65,536 levels, no noise and no darkest level. What
is simulated as it is meant then gives the digital model's numbers. `--page` makes
docs/architectures.md of what a walk has printed.
"""

import argparse
import json
import logging
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).parent))
from tiny import LENGTH, entries, make_inputs, make_tiny

from aixsim_cli.errors import ConfigError
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.read import parse_transform

PAGE = Path(__file__).parents[4] / "docs" / "architectures.md"
FINE = {"q_levels": 65536, "q_lut_min": None, "q_noise": False}
# of the largest logit. A modulator's or detector's step is 1.5e-5 of its range, a value's error a
# third of that; tens of products in a row make it up to 5.5e-3, twice as much with half the levels.
# With the scores of attention ignored the logits move by a tenth and more (`ignoring`).
TOLERANCE = 7.5e-3
# where a model chooses (experts, keys), two candidates may be closer than that: another choice for
# this share of the tokens is no error
CHOSEN_OTHERWISE = 0.05


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        model_type: as `config.model_type`.
        kind: causal, masked or seq2seq.
        result: "equal", "equal, linears only", "refused" or "not built".
        digital: what stays digital, and is said; or why nothing was compared.
        linears, attentions: how many are simulated.
        difference: of the logits to the digital model's, of the largest one.
        ignoring: what that difference would be, were the attentions' scores ignored.
    """

    model_type: str
    kind: str
    result: str
    digital: str = ""
    linears: int = 0
    attentions: int = 0
    difference: float = 0.0
    ignoring: float = 0.0

    def cells(self) -> list[str]:
        """As the page shows it."""
        counts = f"{self.linears} + {self.attentions}" if self.linears else ""
        difference = f"{self.difference:.0e}" if self.linears else ""
        digital = self.digital.replace("|", "/").replace("\n", " ")
        return [self.model_type, self.kind, self.result, counts, difference, digital]


def walk(model_type: str, kind: str) -> Row:
    """Compare one model type with itself."""
    try:
        model = make_tiny(model_type, kind)
        calls = _calls(model, kind)
        with _Choices() as choices:
            digital = [call() for call in calls]
    except Exception as error:
        return Row(model_type, kind, "not built", _reason(error))
    if not all(found.isfinite().all() for found in digital if found is not None):
        return Row(model_type, kind, "not built", "the digital model's logits are not finite")
    said: list[str] = []
    try:
        with _log(said), _products(kind) as products:
            transform = parse_transform({"layer_name_to_config": {"default": FINE}}, source="walk")
            state, _ = transform_hf_model(model, transform)
            found = [call() for call in calls]
    except ConfigError as error:
        return Row(model_type, kind, "refused", str(error))
    except Exception as error:
        return Row(model_type, kind, "FAILS", _reason(error))
    masks = [make_inputs(_fed(model, kind), padded=True).get("attention_mask"), None, None]
    spared = CHOSEN_OTHERWISE if choices.found else 0.0
    difference = max(map(partial(_difference, spared=spared), masks, digital, found))
    attentions = [n for n in state.modules if n.endswith("inner_attention")]
    with _scores_ignored(model, attentions):
        ignoring = max(map(_difference, masks[:2], digital, (call() for call in calls[:2])))
    result = "equal" if attentions else "equal, linears only" if state.modules else "digital"
    if difference > TOLERANCE:
        result = "DIFFERENT"
    elif products and not any("Attention" in text for text in said):
        result = "UNSAID"
    return Row(
        model_type,
        kind,
        result,
        "; ".join([*said, *_never_called(model, state, calls[0]), *_weak(attentions, ignoring)]),
        len(state.modules) - len(attentions),
        len(attentions),
        difference,
        ignoring if attentions else 0.0,
    )


def _calls(model: Any, kind: str) -> list[Any]:
    """With padding, without, and into a static cache where the model has one."""
    fed = _fed(model, kind)
    padded, plain = (make_inputs(fed, padded=padded) for padded in (True, False))
    calls = [partial(_logits, model, padded), partial(_logits, model, plain)]
    if fed == "causal" and _static(model, plain) is not None:
        calls.append(partial(_static, model, plain))
    return calls


def _fed(model: Any, kind: str) -> str:
    # some that hear sound and write text are decoders
    return kind if kind != "seq2seq" or model.config.is_encoder_decoder else "causal"


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:120] if lines else ''}"


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def _static(model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Logits of a prompt that goes into a static cache; None where the digital model has none."""
    try:
        config = model.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=LENGTH + 6)
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        return _logits(model, {**inputs, name: cache, "use_cache": True})
    except ConfigError:
        raise
    except Exception:
        return None


class _Choices(TorchDispatchMode):
    """Whether a model chooses: the largest few of something, or its order."""

    found = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        self.found |= name in {"topk", "sort", "argsort", "argmax"}
        return function(*arguments, **(keywords or {}))


def _difference(
    mask: torch.Tensor | None, expected: torch.Tensor, found: torch.Tensor, spared: float = 0.0
) -> float:
    """Of the logits of all tokens but a share that is spared, of the largest logit."""
    distance = (found - expected).abs().amax(-1)
    if mask is not None and mask.shape == distance.shape:
        distance = distance[mask.bool()]
    kept = distance.flatten().sort().values[: distance.numel() - int(spared * distance.numel())]
    return float(kept.max() / expected.abs().max())


@contextmanager
def _log(said: list[str]):
    """What aixsim's log says while a model is simulated."""
    handler = logging.Handler()
    handler.emit = lambda record: said.append(re.sub(r" stay digital.*", "", record.getMessage()))
    logger = logging.getLogger("aixsim")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@contextmanager
def _products(kind: str):
    """Which softmaxes and attentions are computed digitally, by the function that asks for them."""
    found: list[str] = []
    lengths = {LENGTH} | ({LENGTH // 2} if kind == "seq2seq" else set())

    def counting(function, name):
        def count(x, *arguments, **keywords):
            if x.ndim >= 3 and (name == "attention" or x.shape[-1] in lengths):
                found.append(name)
            return function(x, *arguments, **keywords)

        return count

    functional = nn.functional
    with (
        patch.object(torch, "softmax", counting(torch.softmax, "softmax")),
        patch.object(functional, "softmax", counting(functional.softmax, "softmax")),
        patch.object(
            functional,
            "scaled_dot_product_attention",
            counting(functional.scaled_dot_product_attention, "attention"),
        ),
    ):
        yield found


@contextmanager
def _scores_ignored(model: nn.Module, attentions: list[str]):
    """Every simulated attention attends evenly to all that its mask lets through."""
    modules: list[Any] = [model.get_submodule(name) for name in attentions]

    def even(forward):
        return lambda q, k, v, **keywords: forward(torch.zeros_like(q), k, v, **keywords)

    for module in modules:
        module.forward = even(module.forward)
    yield
    for module in modules:
        del module.forward


def _weak(attentions: list[str], ignoring: float) -> list[str]:
    weak = attentions and ignoring <= 2 * TOLERANCE
    return ["attention hardly matters in this small model: no proof"] if weak else []


def _never_called(model: nn.Module, state: Any, call: Any) -> list[str]:
    """Simulated modules that saw nothing: cross attentions without an encoder, idle experts."""
    model.train()
    try:
        call()
    except Exception as error:
        return [f"not trained: {_reason(error)}"]
    finally:
        model.eval()
    owners = {
        type(model.get_submodule(name.rpartition(".")[0])).__name__
        for name, module in state.modules.items()
        if not bool(module.seen.isfinite().all())
    }
    return [f"not called: in {', '.join(sorted(owners))}"] if owners else []


def page(rows: list[Row]) -> str:
    """The page that shows them."""
    counts = Counter(row.result for row in rows)
    found = "; ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    lines = [_INTRODUCTION.format(version=transformers.__version__, found=found)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Walk and print a line of JSON for each, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; none = all")
    parser.add_argument("--page", type=Path, help="write the page from these lines")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.page:
        lines = options.page.read_text(encoding="utf-8").splitlines()
        PAGE.write_text(page([Row(**json.loads(line)) for line in lines]), encoding="utf-8")
        return
    for model_type, kind in entries():
        if not options.types or model_type in options.types:
            print(json.dumps(asdict(walk(model_type, kind))), flush=True)


_INTRODUCTION = """\
# Architectures

What becomes of every text model type of transformers {version} (causal, masked, sequence to
sequence) when it is simulated. Made by

```bash
python tests/aixsim_cli/models/hf/walk.py > rows.jsonl
python tests/aixsim_cli/models/hf/walk.py --page rows.jsonl
```

and held by `tests/aixsim_cli/models/hf/test_walk.py`, which walks again with
`AIXSIM_TEST_LONG=1`.

A small model of each type, a layer of each kind, runs digitally and as optical hardware with
65,536 levels, no noise and no darkest level; with padding, without, and into a static cache where
the model can use one. **equal**: the logits differ by less than 0.0075 of the largest one, the sum
of some tens of roundings. Ignoring what attention scores moves them by more than twice
as much, but where the last column says no proof. Where a model chooses
(experts, keys), one token in twenty may choose otherwise.
**linears only**: attention stays digital, and the log says so. **not built**: the type
needs something that a small model here does not have; the reason is transformers' own.

*Simulated* counts linears + attentions. The last column is what the log says of what stays digital,
and what this input does not call: cross attention without an encoder, images, sound, idle experts.

In all: {found}.

| type | kind | result | simulated | difference | stays digital |
|---|---|---|---|---|---|"""


if __name__ == "__main__":
    main()

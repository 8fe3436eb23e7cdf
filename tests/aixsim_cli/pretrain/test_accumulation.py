"""k micro-batches are one batch k times as large: the same ranges, and the same gradients."""

import pytest
import torch
import torch.nn.functional as F

from aixsim_cli.models.titan.model import build_model, meta_model, model_args
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.state import state_of

VOCAB, BATCH, LENGTH = 64, 8, 24
ARGS = model_args("aixsim", "debug", VOCAB)
# every draw of noise is another one: with noise only means could be compared
TRANSFORM = parse_transform(
    {"layer_name_to_config": {"default": {"q_noise": False}}}, source="t.yaml"
)


def tokens(seed):
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def second_step(micro_batches):
    """Ranges and gradients after a step whose ranges the step before it has set."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.1
        if p.dim() == 2
        else torch.ones(p.shape)
        for name, p in meta_model(ARGS).named_parameters()
    }
    model = build_model(ARGS, weights, seq_len=LENGTH, transform=TRANSFORM).train()
    state = state_of(model)
    for step, parts in enumerate((1, micro_batches)):
        model.zero_grad()
        state.begin_step(step)
        for part in tokens(step).chunk(parts):
            logits = model(part).flatten(0, 1)
            (F.cross_entropy(logits, part.flatten(), reduction="sum") / BATCH / LENGTH).backward()
        state.end_step()
    ranges = {name: module.ranges for name, module in state.modules.items()}
    return ranges, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulated_is_one_large_batch(micro_batches):
    whole_ranges, whole_grads = second_step(1)
    ranges, grads = second_step(micro_batches)
    assert len(ranges) == 16
    for name in ranges:
        assert torch.equal(ranges[name], whole_ranges[name]), name
    for name in grads:
        difference = (grads[name] - whole_grads[name]).norm() / whole_grads[name].norm()
        assert difference < 1e-5, name

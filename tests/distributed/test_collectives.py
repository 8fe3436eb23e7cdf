"""What a simulated model adds to the traffic of a step: one all-reduce, whatever its depth."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform


@pytest.mark.parametrize("depth", [1, 3, 24])
def test_one_all_reduce_for_all_ranges(monkeypatch, depth):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
    config = parse_transform({"layer_name_to_config": {"default": {}}}, source="test")
    sites = [Site(str(n), f"hf.{n}", "linear") for n in range(depth)]
    state, _ = apply_transform(model, config, sites)
    calls = []

    def all_reduce(tensor, op=None, **options):
        # another rank that saw the same, and -100 to 100 besides: the lowest is negated
        calls.append(tensor.shape)
        assert op == dist.ReduceOp.MAX
        tensor.clamp_(min=100.0)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model(torch.randn(4, 8))
    state.end_step()
    assert calls == [(3 * depth, 3)]
    for module in state.modules.values():
        assert module.ranges.tolist() == [[-100.0, 100.0]] * 3

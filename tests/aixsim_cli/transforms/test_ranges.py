"""The rule that ranges follow, and what is told of what they clip."""

import logging
from dataclasses import dataclass

import pytest
import torch
from aixsim_kernels import clipped_in, seen_of
from torch import nn

from aixsim_cli.transforms import read
from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.config import difference
from aixsim_cli.transforms.optical import OpticalParams
from aixsim_cli.transforms.protocol import Paradigm, Site, defaults_before
from aixsim_cli.transforms.ranges import DEFAULT, SmoothFactor, checked, smooth_factor
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.registry import describe_params
from aixsim_cli.transforms.state import SimulatedLinear

SITES = [Site("0", "layers.0.up", "linear"), Site("2", "layers.1.up", "linear")]


def applied(paradigm="optical", **params):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    data = {"transform": paradigm, "layer_name_to_config": {"default": params}}
    config = parse_transform(data, source="t.yaml")
    state, _ = apply_transform(net, config, SITES)
    return net, state


def step(net, state, low, high):
    net(torch.linspace(low, high, 16).repeat(4, 1))
    state.end_step()
    return net[0].ranges[0].tolist()


@pytest.mark.parametrize(
    ("params", "ends"),
    [
        ({}, [-3, 1.9]),
        ({"q_smooth_factor": 0.9}, [-1.2, 1.9]),
        ({"q_smooth_factor": 0.0}, [-3, 1]),
        ({"q_smooth_factor": [0.5, 1.0]}, [-2, 2]),
    ],
)
def test_an_end_that_is_exceeded_attacks_and_one_that_is_not_releases(params, ends):
    net, state = applied(**params)
    assert step(net, state, -1, 2) == [-1, 2]
    assert step(net, state, -3, 1) == pytest.approx(ends)


@pytest.mark.parametrize("smooth", [-0.1, 1.5, (0.0, 2.0)])
def test_a_weight_is_a_share(smooth):
    with pytest.raises(ValueError, match=r"q_smooth_factor: got .*expected 0 to 1, or two such"):
        checked(smooth)


def factor(saved=True, **params):
    (transform,) = parse_transform({"fc": params}, source="s", saved=saved).transforms
    return transform.rules[0].params.q_smooth_factor


def test_what_was_saved_keeps_its_meaning():
    assert factor() == 0.9 and factor(saved=False) == (0.0, 0.9)
    assert factor(q_smooth_factor=0.9) == factor(q_smooth_factor=0.9, saved=False) == 0.9
    # one rule in two words is one rule
    assert factor(q_smooth_factor=[0.9, 0.9]) == 0.9
    one, other, unnamed = (
        parse_transform({"fc": params}, source="s", saved=True)
        for params in ({"q_smooth_factor": 0.9}, {"q_smooth_factor": [0.9, 0.9]}, {})
    )
    assert difference(one, other) is None
    assert difference(unnamed, one) is None
    assert difference(one, parse_transform({"fc": {}}, source="s")) == (
        "optical (fc: q_smooth_factor 0.9)",
        "optical (fc: q_smooth_factor [0.0, 0.9])",
    )


@dataclass(frozen=True)
class Params:
    q_smooth_factor: SmoothFactor = smooth_factor()  # noqa: RUF009


class Crossbar(SimulatedLinear):
    """What the guide tells a paradigm of one's own to do."""

    quantises = ("w",)
    logs_clipped = True

    def forward(self, x):
        lo, hi = self.ranges[0]
        clipped = ((self.weight < lo) | (self.weight > hi)).float().mean() * (lo <= hi)
        extremes = torch.stack(torch.aminmax(self.weight)).view(1, 2)
        self.record(seen_of(extremes, clipped.view(1)))
        return super().forward(x)


class Own(Paradigm):
    params = Params
    modules = {nn.Linear: Crossbar.from_linear}  # noqa: RUF012


def test_another_paradigm_takes_the_rule_and_has_no_past(monkeypatch, caplog):
    assert defaults_before(Params) == {} and Params().q_smooth_factor == DEFAULT
    monkeypatch.setattr(read, "get_paradigm", lambda name: Own)
    net, state = applied(paradigm="own")
    assert factor() == DEFAULT
    first = [end.item() for end in torch.aminmax(net[0].weight.detach())]
    step(net, state, -1, 1)
    with torch.no_grad():
        net[0].weight.mul_(3)
    step(net, state, -1, 1)
    assert net[0].ranges[0].tolist() == pytest.approx([3 * end for end in first])
    with caplog.at_level(logging.WARNING, "aixsim"):
        share = clipped_in(net[0].seen).item()
        assert state.metrics()["clipped_w/up"] == pytest.approx(share / 2, abs=1e-6)
    assert caplog.messages[0].startswith("0: ")
    with torch.no_grad():
        net[0].weight.div_(3)
    step(net, state, -1, 1)
    ends = [0.9 * 3 * end + 0.1 * end for end in first]
    assert net[0].ranges[0].tolist() == pytest.approx(ends)


def test_the_default_is_shown_as_a_file_has_it():
    rows = {row["parameter"]: row for row in describe_params(OpticalParams)}
    assert rows["q_smooth_factor"]["default"] == [0.0, 0.9]
    assert rows["q_smooth_factor"]["type"] == "float or [float, float]"


def test_shares_that_are_clipped_by_kind_of_layer():
    net, state = applied()
    x = torch.randn(40, 16)
    net(x)
    assert set(state.metrics()) == {"clipped_x/up", "clipped_w/up", "clipped_y/up"}
    assert set(state.metrics().values()) == {0.0}, "a range that was never set clips nothing"
    state.end_step()
    net(3 * x)
    first, second = (clipped_in(m.seen) for m in state.modules.values())
    lo, hi = net[0].ranges[0]
    assert first[0] == pytest.approx(((3 * x < lo) | (3 * x > hi)).float().mean().item())
    assert first[0] > 0.1 and first[2] > 0.1 and first[1] == second[1] == 0
    mean_of_both = (first[2] + second[2]).item() / 2
    net(x)
    assert state.metrics()["clipped_y/up"] == pytest.approx(mean_of_both, abs=1e-6), "the largest"
    assert set(state.metrics().values()) == {0.0}, "since the record before"
    net.eval()
    net(9 * x)
    assert set(state.metrics().values()) == {0.0}, "an evaluation is no part of the training"
    net.train()
    net(9 * x)
    state.reset()
    assert set(state.metrics().values()) == {0.0}


def test_a_clipped_weight_is_told_once(caplog):
    net, state = applied(q_smooth_factor=1.0)
    x = torch.randn(40, 16)
    net(x)
    state.end_step()
    with torch.no_grad():
        net[2].weight.mul_(1.02)
    net(x)
    with caplog.at_level(logging.WARNING, "aixsim"):
        state.metrics()
        assert not caplog.messages, "a few elements are no news"
        with torch.no_grad():
            net[2].weight.mul_(2)
        net(x)
        share = clipped_in(net[2].seen)[1].item()
        assert share > 0.1
        state.metrics()
        state.metrics()
    (told,) = caplog.messages
    assert told.startswith(f"2: {100 * share:.1f} % of its weight lies beyond the range")
    assert "1 of 2 layers" in told and "q_smooth_factor: [0.0, 0.9]" in told


@pytest.mark.parametrize(
    ("params", "growth", "said"),
    [
        # what would be no remedy is not offered
        ({}, 1.2, "expected a smaller learning rate"),
        # so much is asked for, and so little is not much
        ({"q_quantiles": [0.1, 0.9]}, 1.0, None),
        ({"q_quantiles": [0.0005, 0.9995]}, 1.2, "expected a smaller learning rate"),
    ],
)
def test_a_clipped_weight_by_the_rule(caplog, params, growth, said):
    net, state = applied(**params)
    x = torch.randn(40, 16)
    net(x)
    state.end_step()
    with torch.no_grad():
        net[2].weight.mul_(growth)
    net(x)
    assert clipped_in(net[2].seen)[1] > 0.1
    # a later call that clips less hides nothing
    state.end_step()
    with torch.no_grad():
        net[2].weight.div_(growth)
    net(x)
    with caplog.at_level(logging.WARNING, "aixsim"):
        state.metrics()
    assert len(caplog.messages) == (said is not None)
    assert said is None or caplog.messages[0].endswith(said)


def test_the_first_rank_alone_warns(caplog, monkeypatch):
    net, state = applied(q_smooth_factor=1.0)
    net(torch.randn(40, 16))
    state.end_step()
    with torch.no_grad():
        net[0].weight.mul_(2)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank, count in ((1, 0), (0, 1)):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        net(torch.randn(40, 16))
        with caplog.at_level(logging.WARNING, "aixsim"):
            state.metrics()
        assert len(caplog.messages) == count

"""Applying a transform: what is replaced, what it keeps, when its state moves."""

import copy

import pytest
import torch
from aixsim_kernels import are_known_set
from aixsim_kernels.optical.linear import cpu
from torch import nn
from torch.overrides import TorchFunctionMode

from aixsim_cli.errors import ConfigError
from aixsim_cli.transforms.apply import apply_transform, plan_transform
from aixsim_cli.transforms.optical import OpticalLinear
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform

SITES = [Site("0", "first", "linear"), Site("2", "last", "linear", is_head=True)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def optical(**params):
    data = {"layer_name_to_config": {"default": params}}
    return parse_transform(data, source="t.yaml")


def applied(**params):
    net = model()
    state, report = apply_transform(net, optical(**params), SITES)
    return net, state, report


def test_replaces_and_reports():
    net, state, report = applied()
    assert isinstance(net[0], OpticalLinear) and type(net[2]) is nn.Linear
    assert dict(report.replaced) == {("optical", "default"): 1} and report.digital == ["2"]
    assert list(state.modules) == ["0"]


def test_adopts_the_very_parameters():
    net = model()
    weight, names = net[0].weight, set(net.state_dict())
    apply_transform(net, optical(), SITES)
    assert net[0].weight is weight
    assert set(net.state_dict()) == names | {"0.ranges"}


def test_bypass_is_the_digital_model():
    net = model()
    x = torch.randn(4, 16)
    expected = net(x)
    _, report = apply_transform(net, optical(q_bypass=True), SITES)
    assert torch.equal(net(x), expected)
    assert not report.replaced and report.digital == ["0", "2"]


def test_many_levels_without_noise_come_close_to_digital():
    net = model()
    x = torch.randn(64, 16)
    expected = net(x)
    apply_transform(net, optical(q_levels=65536, q_lut_min=None, q_noise=False), SITES)
    assert (net(x) - expected).abs().max() < 1e-3


def test_pattern_that_matches_nothing():
    config = parse_transform({"layer_name_to_config": {"frist": {}}}, source="t.yaml")
    with pytest.raises(ConfigError, match=r"frist.*did you mean 'first'"):
        apply_transform(model(), config, SITES)


class FromHost(TorchFunctionMode):
    """Names of the calls that make a tensor of numbers of Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_copies_nothing_from_the_host_and_waits_for_no_device(monkeypatch):
    """On a GPU a copy of a Python list is a wait; of a meta tensor no value can be asked for.

    But for a look at the ranges at calls 1, 2, 4, 8 ….
    """
    net, state, _ = applied()
    net.to("meta")
    looks = []
    monkeypatch.setattr(state, "_look_at_ranges", lambda: looks.append(step))
    for step in range(10):
        with FromHost() as watch:
            state.begin_step(step)
            state.next_call()
            for module in state.modules.values():
                module.record(torch.ones_like(module.seen))
            state.end_step()
        # the first step leaves the rule's weights on the device
        assert bool(watch.found) == (step == 0)
    assert looks == [0, 1, 3, 7]
    looks.clear()
    state._made = 8
    monkeypatch.setattr(state.calls, "begin", lambda word: False)
    state.next_call()
    assert not looks, "recomputed, it is no call"


@pytest.fixture
def known(monkeypatch):
    """What the host knows of the ranges at each call of the operation, in order."""
    found = []
    forward = cpu.forward

    def noted(x, weight, bias, ranges, *rest):
        found.append(are_known_set(ranges))
        return forward(x, weight, bias, ranges, *rest)

    monkeypatch.setattr(cpu, "forward", noted)
    return found


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_know_when_all_ranges_are_set(known, grad, backend):
    net, state, _ = applied()
    if backend:
        net[0].compile(backend=backend, fullgraph=True)
    x = torch.randn(4, 16, requires_grad=grad)

    def step(number):
        state.begin_step(number)
        with torch.set_grad_enabled(grad):
            net(x)
        state.end_step()

    for number in range(9):
        step(number)
    # looked at before the first call and the second; what follows is known without a look
    assert known == [False, *[True] * 8]
    known.clear()
    net.load_state_dict(net.state_dict())
    step(9)
    state.reset()
    step(10)
    assert known == [False, False], "written into"
    known.clear()
    for number in range(11, 17):
        step(number)
    assert known == [*[False] * 4, True, True], "the sixteenth call looks again"


def test_nothing_stays_known_of_ends_that_may_overtake_each_other(known):
    net, state, _ = applied(q_smooth_factor=[0.99, 0.1])
    for number in range(3):
        state.begin_step(number)
        net(torch.randn(4, 16) + 100 * number)
        state.end_step()
    assert known == [False, True, False]


def test_ranges_move_after_the_step_only():
    net, state, _ = applied(q_smooth_factor=0.5)
    net(torch.linspace(-1, 1, 16).repeat(4, 1))
    assert torch.isinf(net[0].ranges).all(), "the forward must not set ranges"
    state.end_step()
    assert net[0].ranges[0].tolist() == [-1, 1]
    net(torch.linspace(-3, 5, 16).repeat(4, 1))
    net(torch.linspace(-2, 2, 16).repeat(4, 1))
    state.end_step()
    assert net[0].ranges[0].tolist() == [-2, 3], "half way to the extremes of both calls"


def test_a_step_without_forward_keeps_ranges():
    net, state, _ = applied()
    net(torch.randn(4, 16))
    state.end_step()
    before = net[0].ranges.clone()
    state.end_step()
    assert torch.equal(net[0].ranges, before)


def test_evaluation_changes_nothing():
    net, state, _ = applied()
    net(torch.randn(4, 16))
    state.end_step()
    before = copy.deepcopy(net.state_dict())
    net.eval()
    net(100 * torch.randn(4, 16))
    state.end_step()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_buffers_are_updated_in_place():
    net, state, _ = applied()
    saved = net.state_dict()["0.ranges"]
    net(torch.randn(4, 16))
    state.end_step()
    assert torch.equal(saved, net[0].ranges) and torch.isfinite(saved).all()


def test_noise_follows_step_call_and_rank():
    net, state, _ = applied()
    x = torch.randn(32, 16)

    def run(step, rank=0, calls=1):
        state.begin_step(step, rank)
        for _ in range(calls - 1):
            net(x)
        return net(x)

    first = run(3)
    assert torch.equal(first, run(3)), "the same counters draw the same noise"
    for other in (run(4), run(3, rank=1), run(3, calls=2)):
        assert not torch.equal(first, other)


def test_forward_leaves_the_global_generator_alone():
    net, _, _ = applied()
    before = torch.get_rng_state()
    net(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_ranges_stay_float32_under_a_cast():
    net, _, _ = applied()
    net.to(torch.bfloat16)
    assert net[0].ranges.dtype == torch.float32 and net[0].weight.dtype == torch.bfloat16


def test_state_after_to_empty():
    with torch.device("meta"):
        net = model()
    state, _ = apply_transform(net, optical(), SITES)
    net.to_empty(device="cpu")
    net[0].ranges.fill_(float("nan"))
    state.reset()
    assert net[0].ranges.tolist() == [[float("inf"), -float("inf")]] * 3
    assert net[0].noise_key.item() == net[0].stream


def several(*transforms):
    return parse_transform({"transforms": list(transforms)}, source="t.yaml")


def test_two_transforms_on_modules_of_their_own():
    net = model()
    config = several(
        {"transform": "bitflip", "layer_name_to_config": {"first": {"w_p_frac": 0.1}}},
        {"transform": "optical", "layer_name_to_config": {"last": {}}},
    )
    state, report = apply_transform(net, config, SITES)
    assert [type(net[i]).__name__ for i in (0, 2)] == ["BitflipLinear", "OpticalLinear"]
    assert config.name == "bitflip+optical" and list(state.modules) == ["0", "2"]
    assert str(report).splitlines()[:2] == [
        "bitflip: 1 modules match first",
        "optical: 1 modules match last",
    ]
    net(torch.randn(4, 16)).sum().backward()
    state.end_step()
    assert torch.isfinite(net[2].ranges).all()


def test_two_transforms_on_one_module_are_refused():
    config = several({"transform": "bitflip", "fc": {"w_p_frac": 0.1}}, {"fc": {}})
    with pytest.raises(ConfigError) as caught:
        apply_transform(model(), config, SITES)
    assert caught.value.problems == [
        "t.yaml: 0: simulated by bitflip (fc) and by optical (fc); expected one of them, null in "
        "the others"
    ]


def test_a_module_that_one_leaves_digital_is_the_others():
    config = several(
        {
            "transform": "bitflip",
            "layer_name_to_config": {"first": None, "default": {"w_p_frac": 0.1}},
        },
        {"layer_name_to_config": {"first": {}}},
    )
    _, report = apply_transform(model(), config, SITES)
    assert [s.transform.name for s in report.simulated] == ["optical"]


def test_default_of_a_paradigm_without_attention_leaves_it_to_another():
    sites = [*SITES, Site("attention", "attention", "attention")]
    config = several(
        {"transform": "bitflip", "layer_name_to_config": {"default": {"w_p_frac": 0.1}}},
        {"attention": {}},
    )
    report = plan_transform(config, sites)
    assert [(s.site.name, s.transform.name) for s in report.simulated] == [
        ("0", "bitflip"),
        ("attention", "optical"),
    ]


def test_pattern_that_matches_what_the_paradigm_does_not_simulate():
    sites = [*SITES, Site("attention", "attention", "attention")]
    config = several({"transform": "bitflip", "layer_name_to_config": {"attention": {}}})
    with pytest.raises(ConfigError, match=r"transforms\[0\].*attention: matches no linear"):
        plan_transform(config, sites)

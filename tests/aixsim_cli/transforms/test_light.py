"""Lamps of simulated modules: what they are saved as, how they move, what the log says of them."""

import math

import pytest
import torch
from aixsim_kernels import observed_in
from torch import nn

from aixsim_cli.transforms.lamp import Lamp
from aixsim_cli.transforms.optical import OpticalAttention, OpticalLinear
from aixsim_cli.transforms.optical_params import OpticalParams
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import TransformState

SITE = Site("layers.0.wq", "layers.0.wq", "linear")


def linear(weight=None, **params):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=params.pop("bias", False))
    if weight is not None:
        layer.weight.data = weight
    return OpticalLinear.from_linear(layer, OpticalParams(**params), SITE)


def attention(**params):
    return OpticalAttention(OpticalParams(**params), SITE)


def stepped(modules, *calls):
    """Their state, after a step of each call in training."""
    state = TransformState({str(i): module.train() for i, module in enumerate(modules)})
    for step, call in enumerate(calls):
        state.begin_step(step)
        state.next_call()
        call()
        state.end_step()
    return state


def test_what_means_another_thing_has_another_name():
    names = {
        (encoding, kind): sorted(
            attention(photons_per_mac=1.0, encoding=encoding, attention_range=kind).state_dict()
        )
        for encoding in ("differential", "offset")
        for kind in ("unit", "rowmax")
    }
    assert names["differential", "unit"] == ["lamp.ranges", "ranges"]
    assert len({tuple(found) for found in names.values()}) == 4
    # a linear has no rows that are scaled
    one = linear(photons_per_mac=1.0, attention_range="rowmax").state_dict()
    assert sorted(one) == ["lamp.ranges", "ranges", "weight"]
    assert "lamp_offset.ranges" in linear(photons_per_mac=1.0, encoding="offset").state_dict()
    assert sorted(linear().state_dict()) == ["ranges", "weight"]


def test_a_lamp_is_a_running_mean():
    module, batches = linear(photons_per_mac=5.0), [torch.randn(50, 64) for _ in range(3)]
    batches[1] *= 3
    seen = []

    def call(x):
        module(x)
        seen.append(float(observed_in(module.seen)[3, 0]))

    stepped([module], *[lambda x=x: call(x) for x in batches])
    # 0.9 of what it was, up and down
    expected = seen[0]
    for own in seen[1:]:
        expected = 0.9 * expected + 0.1 * own
    low, high = module.lamp.ranges[0].tolist()
    assert low == high == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_log_says_what_was_counted(bias):
    x = torch.randn(4000, 64)
    module = linear(photons_per_mac=20.0, q_levels_out=65536, bias=bias)
    state = stepped([module], lambda: module(x), lambda: module(x))
    found = state.metrics()
    assert found["photons_per_token"] == pytest.approx(20 * 64 * 48, rel=1e-3)
    still = linear(q_noise=False, q_levels_out=65536, bias=bias)
    still.ranges.copy_(module.ranges)
    signal = still.eval()(x)
    noise = module.eval()(x) - signal
    if bias:
        signal = signal - still.bias
    assert found["snr/wq"] == pytest.approx(float(signal.std() / noise.std()), rel=0.05)


def test_a_mask_is_no_more_light_than_the_same_by_name():
    q, k, v = torch.randn(2, 4, 32, 16), torch.randn(2, 2, 32, 16), torch.randn(2, 2, 32, 16)
    masks = {"flag": (None, True), "mask": (torch.ones(32, 32, dtype=torch.bool).tril(), False)}
    found = {}
    for name, (mask, is_causal) in masks.items():
        module = attention(photons_per_mac=3.0)
        call = lambda: module(q, k, v, attn_mask=mask, is_causal=is_causal)  # noqa: B023, E731
        found[name] = stepped([module], call, call).metrics()
    # four heads, 16.5 keys on average, sums of 16 and outputs of 16
    assert found["flag"]["photons_per_token"] == pytest.approx(3 * 4 * 16.5 * 32, rel=1e-2)
    for key in ("photons_per_token", "snr/attention"):
        assert found["mask"][key] == pytest.approx(found["flag"][key], rel=1e-3)


def test_no_light_sets_no_lamp_and_spoils_no_log():
    dark = linear(torch.zeros(48, 64), photons_per_mac=5.0)
    other = linear(photons_per_mac=5.0)
    x = torch.randn(9, 64)

    def call():
        dark(x), other(x)

    state = stepped([dark, other], call, call)
    assert not dark.lamp.ranges.isfinite().any()
    found = state.metrics()
    assert all(map(math.isfinite, found.values()))
    assert found["photons_per_token"] == pytest.approx(5 * 64 * 48, rel=0.2)
    # and then there is some
    dark.weight.data = torch.randn(48, 64)
    # in the first step its weight's range has no width yet
    stepped([dark, other], call, call)
    assert dark.lamp.ranges.isfinite().all() and (dark.lamp.ranges > 0).all()


def test_a_lamp_stays_what_it_is_in_16_bits():
    lamp = Lamp(2, torch.device("cpu"))
    lamp.ranges.fill_(2e-9)
    for cast in (lamp.half, lamp.bfloat16):
        assert (cast().ranges == 2e-9).all() and lamp.ranges.dtype == torch.float32
    module = linear(photons_per_mac=1e5).half()
    assert module.lit.dtype == torch.float32


@pytest.mark.parametrize("params", [{}, {"photons_per_mac": 50.0}], ids=["dither", "light"])
def test_a_module_compiles_in_one_graph(params):
    torch._dynamo.reset()
    x = torch.randn(6, 64)
    module = linear(**params).train()
    stepped([module], lambda: module(x))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    heads = attention(**params).train()
    stepped([heads], lambda: heads(q, k, v))
    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), heads(q, k, v))


def test_parameters_of_python_need_not_be_hashable():
    module = attention(q_quantiles=[0.01, 0.99], photons_per_mac=50.0).train()
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    stepped([module], lambda: module(q, k, v))

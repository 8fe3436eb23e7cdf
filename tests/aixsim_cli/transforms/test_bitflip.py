"""Bit-flips in linear layers: what flips, what stays off, and that training sees through it."""

import pytest
import torch
from aixsim_kernels import bitflip
from torch import nn
from torch.utils.checkpoint import checkpoint

from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.bitflip import BitflipLinear, BitflipParams
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform, read_transform


def applied(**params):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16))
    data = {"transform": "bitflip", "fc": params}
    state, report = apply_transform(
        net, parse_transform(data, source="t.yaml"), [Site("0", "first", "linear")]
    )
    return net, state, report


def test_input_and_weight_flip_each_with_its_own():
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    net, state, _ = applied(x_p_frac=0.3, w_p_exp=0.1, w_zero_out_t=0.5)
    state.begin_step(3)
    y = net(x)
    layer = net[0]
    assert isinstance(layer, BitflipLinear)
    weight = bitflip(layer.weight, layer.noise_key, stream=1, p_exp=0.1, zero_out=0.5)
    flipped = bitflip(x, layer.noise_key, stream=0, p_frac=0.3)
    assert torch.equal(y, nn.functional.linear(flipped, weight, layer.bias))


@pytest.mark.parametrize("params", [{}, {"seed": 5}])
def test_all_null_is_the_digital_layer(params):
    net, _, report = applied(**params)
    assert type(net[0]) is nn.Linear and not report.simulated


def test_probability_0_and_a_wide_threshold_are_the_digital_layer():
    x = torch.randn(5, 24)
    net, _, report = applied(x_p_exp=0, w_p_frac=0.0, x_zero_out_t=1e30)
    assert len(report.simulated) == 1
    assert torch.equal(net(x), nn.functional.linear(x, net[0].weight, net[0].bias))


def test_flips_follow_seed_step_call_and_rank():
    x = torch.randn(32, 24)

    def run(step, rank=0, calls=1, **params):
        net, state, _ = applied(x_p_frac=0.1, **params)
        state.begin_step(step, rank)
        return [net(x) for _ in range(calls)][-1]

    first = run(3)
    assert torch.equal(first, run(3))
    for other in (run(4), run(3, rank=1), run(3, calls=2), run(3, seed=1)):
        assert not torch.equal(first, other)


def test_no_state_is_saved():
    net, state, _ = applied(x_p_frac=0.1)
    net(torch.randn(2, 24))
    state.end_step()
    assert set(net.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flips_are_those_of_the_compute_type(dtype):
    net, state, _ = applied(x_p_frac=1.0)
    x = torch.randn(5, 24)
    state.begin_step(1)
    with torch.autocast("cpu", dtype=dtype):
        y = net(x)
    flipped = bitflip(x.to(dtype), net[0].noise_key, stream=0, p_frac=1.0)
    expected = nn.functional.linear(flipped, net[0].weight.to(dtype), net[0].bias.to(dtype))
    assert y.dtype == dtype and torch.equal(y, expected)


def test_gradients_use_the_flipped_other_operand():
    net, state, _ = applied(x_p_frac=0.2, w_p_frac=0.2)
    x = torch.randn(5, 24, requires_grad=True)
    state.begin_step(1)
    net(x).sum().backward()
    layer, ones = net[0], torch.ones(5, 16)
    weight = bitflip(layer.weight, layer.noise_key, stream=1, p_frac=0.2)
    flipped = bitflip(x, layer.noise_key, stream=0, p_frac=0.2)
    torch.testing.assert_close(x.grad, ones @ weight)
    torch.testing.assert_close(layer.weight.grad, ones.T @ flipped)


def test_recomputation_sees_the_same_flips():
    gradients = []
    for recompute in (False, True):
        net, state, _ = applied(x_p_frac=0.2, w_p_frac=0.2)
        x = torch.ones(5, 24, requires_grad=True)
        state.begin_step(1)
        layer, net[0] = net[0], nn.Identity()
        h = net(x)
        y = checkpoint(layer, h, use_reentrant=False) if recompute else layer(h)
        y.square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_compiled_layer_computes_the_same():
    net, state, _ = applied(x_p_exp=0.01, x_p_frac=0.1, w_p_frac=0.1, x_zero_out_t=30.0)
    x = torch.randn(5, 24)
    state.begin_step(2)
    expected = net(x)
    net[0].compile(fullgraph=True, backend="aot_eager")
    state.begin_step(2)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fc", BitflipParams(2**-17, 2**-17, 30.0, 2**-17, 2**-17, 1.25)),
        ("weights-fraction", BitflipParams(w_p_frac=2**-10)),
        ("lora", BitflipParams(2**-16, 2**-16, 30.0, 2**-16, 2**-16, 1.25)),
    ],
)
def test_files_have_the_fields_settings(name, expected):
    path = f"configs/transforms/bitflip-{name}.yaml"
    config = read_transform(path)
    (transform,) = config.transforms
    rule = transform.simulates(Site("layers.0.attention.wq", "q", "linear"))
    assert rule is not None and rule.params == expected
    assert transform.simulates(Site("layers.0.attention", "a", "attention")) is None
    assert config.uses_lora == (name == "lora")

"""Low-rank updates: what trains, where they act, and that a merged model is the same."""

import copy

import pytest
import torch
from torch import nn

from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.lora import add_lora, merge_lora
from aixsim_cli.transforms.protocol import Lora, Site
from aixsim_cli.transforms.read import parse_transform

SITES = [Site("0", "first", "linear"), Site("2", "second", "linear")]
OPTICAL = {"transform": "optical", "fc": {"q_levels": 256}}
_FLIPS = {"x_p_frac": 0.1, "w_p_frac": 0.1, "w_p_exp": 0.001, "w_zero_out_t": 1}
BITFLIP = {"transform": "bitflip", "fc": _FLIPS}
LORA = {"r": 4, "alpha": 8}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def applied(data, net=None):
    net = net or model()
    apply_transform(net, parse_transform(data, source="t.yaml"), SITES)
    return net


def run(net, x, step=1):
    net.transform_state.begin_step(step)
    return net(x)


def train(net, steps=3):
    torch.manual_seed(1)
    x, target = torch.randn(64, 16), torch.randn(64, 8)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        loss = (run(net, x, step) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.transform_state.end_step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=[OPTICAL, BITFLIP], ids=["optical", "bitflip"])
def data(request):
    return request.param | {"lora": LORA}


def test_starts_as_the_model_without(data):
    x = torch.randn(8, 16)
    expected = run(applied(data), x)
    net = applied(data)
    assert add_lora(net) == ["0", "2"]
    assert torch.equal(run(net, x), expected)


def test_only_the_updates_train(data):
    net = applied(data)
    before = copy.deepcopy(net.state_dict())
    add_lora(net)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{i}.parametrizations.weight.0.{m}" for i in (0, 2) for m in "AB"}
    losses = train(net, 30)
    assert losses[-1] < losses[0]
    for i in (0, 2):
        assert torch.equal(net[i].parametrizations.weight.original, before[f"{i}.weight"])
        assert torch.equal(net[i].bias, before[f"{i}.bias"])


def test_the_sum_is_what_the_hardware_is_given(data):
    net = applied(data)
    add_lora(net)
    train(net)
    state = net[0].parametrizations.weight
    expected = state.original + LORA["alpha"] / LORA["r"] * state[0].B @ state[0].A
    assert state[0].B.abs().max() > 0
    torch.testing.assert_close(net[0].weight, expected)
    plain = model()
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(net[i].weight)
            plain[i].bias.copy_(net[i].bias)
    applied(data, plain)
    for i in (0, 2):
        if len(net[i].ranges):
            plain[i].ranges.copy_(net[i].ranges)
    x = torch.randn(8, 16)
    assert torch.equal(run(net, x), run(plain, x))


def test_merged_model_is_the_same_and_ordinary(data):
    net = applied(data)
    names, kinds = set(net.state_dict()), [type(m) for m in net]
    add_lora(net)
    train(net)
    x = torch.randn(8, 16)
    expected = run(net, x)
    copied = copy.deepcopy(net)
    assert merge_lora(copied) == ["0", "2"]
    assert torch.equal(run(copied, x), expected)
    assert set(copied.state_dict()) == names and [type(m) for m in copied] == kinds
    assert all(p.requires_grad for p in copied.parameters())
    # the copy's own: the original goes on training its updates
    assert "0.parametrizations.weight.0.A" in net.state_dict()
    assert merge_lora(copied) == []


def test_state_dict_round_trip_resumes(data):
    net = applied(data)
    add_lora(net)
    train(net)
    other = applied(data)
    add_lora(other)
    other.load_state_dict(net.state_dict())
    x = torch.randn(8, 16)
    assert torch.equal(run(net, x), run(other, x))


def test_compiled(data):
    net = applied(data)
    add_lora(net)
    train(net)
    x = torch.randn(8, 16)
    expected = run(net, x)
    net[0].compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(net, x), expected)
    run(net, x).sum().backward()
    assert net[0].parametrizations.weight[0].A.grad.abs().max() > 0


def test_updates_are_drawn_alike_everywhere_without_the_global_generator(data):
    nets = [applied(data, nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])) for _ in range(2)]
    before = torch.get_rng_state()
    for net in nets:
        add_lora(net)
    assert torch.equal(before, torch.get_rng_state())
    a, b = (net[0].parametrizations.weight[0].A for net in nets)
    assert torch.equal(a, b)
    assert not torch.equal(a, nets[0][2].parametrizations.weight[0].A)


def test_16_bit_weights_keep_updates_of_32(data):
    net = applied(data, model().to(torch.bfloat16))
    add_lora(net)
    update = net[0].parametrizations.weight[0]
    assert update.A.dtype == torch.float32 and net[0].weight.dtype == torch.bfloat16
    assert run(net, torch.randn(8, 16).to(torch.bfloat16)).dtype == torch.bfloat16


def test_weight_stored_transposed(data):
    net = applied(data)
    layer = net[0]
    x = torch.randn(8, 16)
    expected = run(net, x)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    layer.stores_transposed = True
    by_rows = property(lambda module: module._parameters["weight"].T)
    layer.__class__ = type("Transposed", (type(layer),), {"weight": by_rows})
    assert torch.equal(run(net, x), expected)
    add_lora(net)
    assert torch.equal(run(net, x), expected)
    train(net)
    expected = run(net, x)
    merge_lora(net)
    assert net.state_dict()["0.weight"].shape == (16, 32)
    assert torch.equal(run(net, x), expected)


def test_a_shared_weight_is_refused(data):
    net = model()
    net.append(nn.Linear(16, 32))
    net[3].weight = net[0].weight
    applied(data, net)
    with pytest.raises(UserError, match="lora: 0: its weight is another module's too"):
        add_lora(net)


def test_without_lora_nothing_changes():
    for net in (applied(OPTICAL), model()):
        assert add_lora(net) == [] and all(p.requires_grad for p in net.parameters())
        assert "0.weight" in net.state_dict()


def test_pretraining_from_scratch_refuses_it(data):
    from aixsim_cli.config.pretrain import build_config
    from aixsim_cli.settings.document import Document

    config = {"model": {"name": "aixsim", "flavor": "debug"}, "transform": data}
    with pytest.raises(ConfigError, match="lora: low-rank updates of random weights"):
        build_config(Document(config, "c.yaml"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"lora": {"r": 8, "alpha": 16}}, Lora(8, 16)),
        ({"lora": {}}, Lora(32, 32)),
        ({"use_lora": True}, Lora(32, 32)),
        ({"use_lora": True, "lora": {"r": 8, "lora_alpha": 4}}, Lora(8, 4)),
        ({"use_lora": False, "lora": {"r": 8}}, None),
        ({"lora": None}, None),
        ({}, None),
    ],
)
def test_how_a_config_asks_for_it(words, expected):
    config = parse_transform(OPTICAL | words, source="t.yaml")
    assert config.transforms[0].lora == expected
    assert config.uses_lora == (expected is not None)

"""What is recomputed in a backward draws the noise of its own call, whatever ran in between."""

import copy
import functools
import pickle
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from aixsim_kernels import uniform_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from aixsim_cli.errors import RunError
from aixsim_cli.transforms.apply import apply_transform, begin_calls_of_parts
from aixsim_cli.transforms.protocol import Paradigm, Site, param
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.registry import PARADIGMS
from aixsim_cli.transforms.state import SimulatedLinear

WIDTH = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.inner_attention(q, k, v, is_causal=True)[:, 0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.out(self.attention(x)))


class Net(nn.Module):
    """Blocks that `run(block, x)` runs."""

    def __init__(self, n_blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(n_blocks))
        self.run = lambda block, x: block(x)

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


def sites(n_blocks=2):
    for i in range(n_blocks):
        yield Site(f"blocks.{i}.attention", f"blocks.{i}.attention", "attention")
        for name in (f"blocks.{i}.attention.qkv", f"blocks.{i}.out"):
            yield Site(name, name, "linear")


@dataclass(frozen=True)
class DriftParams:
    spread: float = param(0.1, "width of a weight's error")


class DriftLinear(SimulatedLinear):
    def forward(self, input):
        error = uniform_noise(*self.weight.shape, self.noise_key, stream=0)
        weight = self.weight * (1 + self.params.spread * error)
        return nn.functional.linear(input, weight, self.bias)


class Drift(Paradigm):
    """A paradigm of somebody else."""

    params = DriftParams
    modules = {nn.Linear: DriftLinear.from_linear}  # noqa: RUF012


OPTICAL = {"q_levels": 64}
QUIET = OPTICAL | {"q_noise": False}
FLIPS = {"x_p_frac": 0.1, "w_p_frac": 0.1, "x_zero_out_t": 2.0}


def simulated(kind="optical", run=None, n_blocks=2):
    """A model, and its state; its attention is optical, without noise where linears are not."""
    torch.manual_seed(0)
    net = Net(n_blocks)
    if run is not None:
        net.run = run
    data = {"layer_name_to_config": {"default": OPTICAL}}
    if kind != "optical":
        layers = {"default": FLIPS if kind == "bitflip" else {"spread": 0.5}}
        data = {
            "transforms": [
                {"transform": kind, "layer_name_to_config": layers},
                {"use_regex": True, "layer_name_to_config": {r".*\.attention": QUIET}},
            ]
        }
    state, _ = apply_transform(net, parse_transform(data, source="t.yaml"), list(sites(n_blocks)))
    return net, state


@pytest.fixture(autouse=True)
def drift(monkeypatch):
    monkeypatch.setitem(PARADIGMS, "drift", f"{__name__}:Drift")


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, WIDTH, generator=generator).requires_grad_() for _ in range(n)]


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def one_by_one(kind="optical"):
    """Gradients when the backward of a call follows its forward: the noise cannot be another's."""
    net, state = simulated(kind)
    state.begin_step(5)
    for x in inputs():
        net(x).square().sum().backward()
    return gradients(net)


def close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def fail(grad):
    raise ValueError("fails")


def saves_nothing():
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE
            if op is torch.ops.aten.mm.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


RUNS = {
    "no checkpoints": None,
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "selective": functools.partial(checkpoint, use_reentrant=False, context_fn=saves_nothing),
    "not reentrant, nested": lambda block, x: checkpoint(
        lambda y: checkpoint(block, y, use_reentrant=False) * 1.0, x, use_reentrant=False
    ),
    "reentrant, nested": lambda block, x: checkpoint(
        lambda y: checkpoint(block, y, use_reentrant=True) * 1.0, x, use_reentrant=True
    ),
}


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("kind", ["optical", "bitflip", "drift"])
def test_two_forwards_and_one_backward(kind, how):
    net, state = simulated(kind, RUNS[how])
    state.begin_step(5)
    first, second = (net(x) for x in inputs())
    (first.square().sum() + second.square().sum()).backward()
    close(gradients(net), one_by_one(kind))


@pytest.mark.parametrize("how", RUNS)
def test_two_forwards_and_their_backwards_in_either_order(how):
    expected = one_by_one()
    for order in ((0, 1), (1, 0)):
        net, state = simulated(run=RUNS[how])
        state.begin_step(5)
        losses = [net(x).square().sum() for x in inputs()]
        for i in order:
            losses[i].backward()
        close(gradients(net), expected)


@pytest.mark.parametrize("how", RUNS)
def test_preference_loss_of_two_calls(how):
    """As DPO has it: one number of both calls, and a frozen reference that draws noise too."""
    found = []
    for run in (None, RUNS[how]):
        net, state = simulated(run=run)
        reference, reference_state = simulated()
        state.begin_step(5)
        reference_state.begin_step(5)
        chosen, rejected = inputs()
        good, bad = net(chosen).sum((1, 2)), net(rejected).sum((1, 2))
        with torch.no_grad():
            margin = (reference(chosen) - reference(rejected)).sum((1, 2))
        loss = -nn.functional.logsigmoid(good - bad - margin).mean()
        if run is not None:
            with torch.no_grad():
                net(chosen)
        loss.backward()
        found.append(gradients(net))
    close(*found)


@pytest.mark.parametrize("how", RUNS)
def test_a_look_without_gradients_between_forward_and_backward(how):
    net, state = simulated(run=RUNS[how])
    state.begin_step(5)
    losses = []
    for x in inputs():
        losses.append(net(x).square().sum())
        call = state.call
        with torch.no_grad():
            net(x)
            net(2 * x)
        # the next call of the comparison is the second
        state.call = call
    sum(losses).backward()
    close(gradients(net), one_by_one())


def test_recomputation_is_no_call():
    net, state = simulated(run=RUNS["not reentrant"])
    state.begin_step(5)
    net(inputs(1)[0]).sum().backward()
    assert state.call == 1
    key = net.blocks[0].out.noise_key
    assert torch.equal(key, net.blocks[0].out.noise_key)


def test_a_whole_model_is_recomputed_with_its_own_noise():
    net, state = simulated()
    state.begin_step(5)
    losses = [checkpoint(net, x, use_reentrant=False).square().sum() for x in inputs()]
    sum(losses).backward()
    close(gradients(net), one_by_one())
    assert state.call == 2


def test_a_whole_model_in_a_reentrant_checkpoint_is_refused():
    net, state = simulated()
    state.begin_step(5)
    losses = [checkpoint(net, x, use_reentrant=True).square().sum() for x in inputs()]
    with pytest.raises(RunError, match="expected use_reentrant=False, or checkpoints of the model"):
        sum(losses).backward()


def test_a_call_that_is_not_known_is_refused():
    net, state = simulated()
    x = inputs(1)[0]
    loss = checkpoint(net.blocks[0], x, use_reentrant=False).square().sum()
    state.begin_step(5)
    net(x)
    with pytest.raises(RunError, match="whose call is not known: it ran outside of the model"):
        loss.backward()


def test_graphs_of_several_threads_are_refused():
    net, state = simulated(run=RUNS["not reentrant"])
    state.begin_step(5)
    losses = []
    thread = threading.Thread(target=lambda: losses.append(net(inputs()[0]).sum()))
    thread.start()
    thread.join()
    losses.append(net(inputs()[1]).sum())
    with pytest.raises(RunError, match="several threads"):
        sum(losses).backward()


def test_a_failed_backward_leaves_nothing_behind():
    net, state = simulated(run=RUNS["reentrant"])
    expected = one_by_one()
    state.begin_step(5)
    x = inputs(1)[0]
    failing = net(x)
    x.register_hook(fail)
    with pytest.raises(ValueError, match="fails"):
        failing.sum().backward()
    net.zero_grad()
    state.begin_step(5)
    sum(net(x).square().sum() for x in inputs()).backward()
    close(gradients(net), expected)


@pytest.mark.parametrize("how", ["not reentrant", "reentrant"])
def test_another_loss_after_a_failed_backward(how):
    net, state = simulated(run=RUNS[how])
    found = []
    for fails in (False, True):
        net.zero_grad()
        state.begin_step(5)
        first, second = inputs()
        losses = [net(x).square().sum() for x in (first, second)]
        if fails:
            first.register_hook(fail)
            with pytest.raises(ValueError, match="fails"):
                losses[0].backward()
            net.zero_grad()
        losses[1].backward()
        found.append(gradients(net))
    close(*found)


def test_another_calls_gradients_within_a_backward():
    """A hook asks for them where the backward has recomputed something of its own call."""
    expected, weight = one_by_one(), "blocks.0.out.weight"
    net, state = simulated(run=RUNS["not reentrant"])
    state.begin_step(5)
    first, second = inputs()
    losses = [net(x).square().sum() for x in (first, second)]
    found = []

    def look(grad):
        found.append(torch.autograd.grad(losses[1], net.get_parameter(weight))[0])

    first.register_hook(look)
    losses[0].backward()
    close({weight: found[0] + net.get_parameter(weight).grad}, {weight: expected[weight]})


def test_another_calls_gradients_within_what_is_recomputed():
    """A hook asks for them in a reentrant checkpoint, before one within it recomputes too."""
    name, found = "blocks.0.out.weight", []

    def run(block, x):
        if not losses:
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(lambda y: hooked(RUNS["reentrant"](block, y)), x, use_reentrant=True)

    def hooked(y):
        if looks and y.requires_grad:
            y.register_hook(look)
        return y * 1.0

    def look(grad):
        weight = net.get_parameter(name)
        found.append({name: torch.autograd.grad(losses[0], weight, retain_graph=True)[0]})

    net, state = simulated(run=run)
    first, second = inputs()
    for looks in (False, True):
        net.zero_grad()
        state.begin_step(5)
        losses = []
        losses.append(net(first).square().sum())
        if not looks:
            look(None)
        loss = net(second).square().sum()
        with torch.no_grad():
            net(first)
        loss.backward()
        found.append(gradients(net))
    alone, expected, *looked, got = found
    assert len(looked) == 2 and not state.calls._thread._recomputed
    close(got, expected)
    for grads in looked:
        close(grads, alone)


def in_a_thread(function, *args):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("how", RUNS)
def test_a_look_by_another_thread_within_a_forward(how):
    looks = []

    @torch.no_grad()
    def look(x):
        looks.append(x)
        return net(x)

    def run(block, x):
        y = block(x) if RUNS[how] is None else RUNS[how](block, x)
        if looking and not looks:
            in_a_thread(look, x)
        return y

    net, state = simulated(run=run)
    x, found = inputs(1)[0], []
    for looking in (False, True):  # noqa: B007
        net.zero_grad()
        state.begin_step(5)
        net(x).square().sum().backward()
        found.append(gradients(net))
    assert looks
    close(*found)


def test_a_thread_that_trained_and_ended_is_forgotten():
    net, state = simulated(run=RUNS["not reentrant"])
    state.begin_step(5)
    in_a_thread(lambda x: net(x).square().sum().backward(), inputs()[0])
    net(inputs()[1]).square().sum().backward()
    close(gradients(net), one_by_one())


def test_calls_of_several_threads_are_counted_one_by_one():
    net, state = simulated(n_blocks=1)
    state.begin_step(5)
    words, x = set(), inputs(1)[0].detach()

    def call():
        for _ in range(50):
            net(x)
            words.add(state.calls.word())

    threads = [threading.Thread(target=call) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(words) == state.call == 200


def test_a_part_of_parts_is_called_once():
    net, state = simulated(n_blocks=1)
    begin_calls_of_parts(net, (Block, Attention))
    x = inputs(1)[0]
    for n in (1, 2):
        net.blocks[0](x)
        assert state.call == n
    net(x)
    assert state.call == 3


def test_a_part_called_while_another_thread_calls_the_whole():
    net, state = simulated(n_blocks=1)
    begin_calls_of_parts(net, Block)
    x, keys = inputs(1)[0], []

    def part_alone():
        part(x)
        keys.append(part.out.noise_key)

    part = net.blocks[0]
    net.run = lambda block, x: in_a_thread(part_alone) or block(x)
    net(x)
    assert state.call == 2
    assert not torch.equal(keys[0], part.out.noise_key)


def test_parts_draw_new_noise_after_an_interrupt():
    net, _ = simulated(n_blocks=1)
    begin_calls_of_parts(net, Block)

    def interrupt(block, x):
        raise KeyboardInterrupt

    x, part, net.run = inputs(1)[0], net.blocks[0], interrupt
    with pytest.raises(KeyboardInterrupt):
        net(x)
    assert not torch.equal(part(x), part(x))


def test_parts_of_a_compiled_model_are_no_calls():
    """Also where the graph breaks before them."""

    def run(block, x):
        torch._dynamo.graph_break()
        return block(x)

    net, state = simulated(run=run)
    begin_calls_of_parts(net, (Block, Attention))
    net.compile(backend="aot_eager")
    torch._dynamo.reset()
    x = inputs(1)[0]
    net(x)
    state.begin_step(5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (1, 2):
            net(x).sum().backward()
            assert state.call == n


@pytest.mark.parametrize("how", ["no checkpoints", "not reentrant", "reentrant"])
def test_compiled_blocks(how):
    """A compiled block is compiled once, and asks for its call when it runs."""
    net, state = simulated(run=RUNS[how], n_blocks=2)
    for block in net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    net(inputs(1)[0]).sum().backward()
    with torch.no_grad():
        net(inputs(1)[0])
    net.zero_grad()
    state.begin_step(5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sum([net(x).square().sum() for x in inputs()]).backward()
        close(gradients(net), one_by_one())
        with torch.no_grad():
            assert not torch.equal(net(inputs()[0]), net(inputs()[0])), "a call draws new noise"


def test_a_checkpoint_within_a_compiled_block():
    net, state = simulated(n_blocks=1)
    run = torch.compile(
        lambda x: checkpoint(net.blocks[0], x, use_reentrant=False),
        backend="aot_eager",
        fullgraph=True,
    )
    plain, plain_state = simulated(n_blocks=1)
    net.run, found = (lambda block, x: run(x)), []
    for model, its_state in ((net, state), (plain, plain_state)):
        its_state.begin_step(5)
        sum(model(x).square().sum() for x in inputs()).backward()
        found.append(gradients(model))
    close(*found)


def test_a_copy_has_calls_of_its_own():
    net, state = simulated(run=RUNS["not reentrant"])
    state.begin_step(5)
    x = inputs(1)[0]
    net(x)
    for twin in (copy.deepcopy(net), pickled(net)):
        calls = {module.calls for module in twin.transform_state.modules.values()}
        assert calls == {twin.transform_state.calls} and state.calls not in calls
        assert twin.transform_state.calls.number != state.calls.number
        key = twin.blocks[0].out.noise_key
        assert torch.equal(key, net.blocks[0].out.noise_key)
        twin(x)
        assert not torch.equal(key, twin.blocks[0].out.noise_key)
        assert torch.equal(key, net.blocks[0].out.noise_key)


def pickled(net):
    net.run = None
    twin = pickle.loads(pickle.dumps(net))
    net.run = twin.run = RUNS["not reentrant"]
    return twin


def test_the_same_counters_draw_the_same_noise_after_a_recomputation():
    net, state = simulated(run=RUNS["not reentrant"])
    x = inputs(1)[0]
    outs = []
    for _ in range(2):
        state.begin_step(7)
        outs.append(net(x))
        outs[-1].sum().backward()
    assert torch.equal(*outs)
    state.begin_step(8)
    assert not torch.equal(outs[0], net(x))


def test_an_exported_program_needs_no_model():
    net, _ = simulated(n_blocks=1)
    x = inputs(1)[0]
    program = torch.export.export(net.eval(), (x,), strict=False)
    assert "aixsim.noise_key" not in program.graph_module.code
    with torch.no_grad():
        first = program.module()(x)
        net(x)
        assert torch.equal(first, program.module()(x))


def test_the_operator_of_compiled_code():
    net, state = simulated()
    state.begin_step(1)
    net(inputs(1)[0])
    module = net.blocks[0].out
    arguments = (module.noise_stream, state.calls.number)
    torch.library.opcheck(torch.ops.aixsim.noise_key, arguments)
    assert torch.equal(torch.ops.aixsim.noise_key(*arguments), module.noise_key)
    assert torch.Tag.cudagraph_unsafe in torch.ops.aixsim.noise_key.default.tags


STEPS = st.lists(
    st.tuples(st.sampled_from(["call", "look", "backward"]), st.integers(0, 5)),
    min_size=2,
    max_size=8,
)


@settings(max_examples=30)
@given(STEPS, st.sampled_from(["optical", "bitflip"]), st.booleans())
def test_calls_and_backwards_in_any_order(steps, kind, keeps_graphs):
    """Every gradient is, bit by bit, the one without checkpoints.

    A look is a call without gradients; a backward goes through any call that is still to be gone
    through, or that was, where its graph is kept.
    """

    def gradients(run):
        net, state = simulated(kind, run)
        state.begin_step(3)
        losses, found = [], []
        for step, number in steps:
            x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(number))
            if step == "call":
                losses.append(net(x).square().sum())
            elif step == "look":
                with torch.no_grad():
                    found.append([net(x)])
            elif losses:
                which = number % len(losses)
                loss = losses[which] if keeps_graphs else losses.pop(which)
                weights = list(net.parameters())
                found.append(torch.autograd.grad(loss, weights, retain_graph=keeps_graphs))
        return found

    checkpointed = functools.partial(checkpoint, use_reentrant=False)
    for mine, theirs in zip(gradients(checkpointed), gradients(None), strict=True):
        assert all(map(torch.equal, mine, theirs))

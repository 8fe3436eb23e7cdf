"""What the tuner can be held to without a GPU: its names, and that no candidate ends it."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def tune(script):
    return script("tune_kernels")


def dir_of(*modules):
    return {name for module in modules for name in vars(module)}


def test_every_kernel_that_is_tuned_exists(tune):
    pytest.importorskip("triton")
    from aixsim_kernels.optical.attention import triton_backward, triton_forward
    from aixsim_kernels.optical.linear import triton as linear

    assert {"_product", *tune.PASSES.values()} <= dir_of(linear, triton_forward, triton_backward)


@pytest.mark.parametrize("kind", ["compiler", "resources", "assembler", "launch"])
def test_a_candidate_that_cannot_be_is_left_out(tune, kind, monkeypatch, capsys):
    pytest.importorskip("triton")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    error = {
        "compiler": CompilationError("source", None, "no"),
        "resources": OutOfResources(300000, 200000, "shared memory"),
        "assembler": PTXASError("no"),
        "launch": RuntimeError("Triton Error [CUDA]: an illegal memory access"),
    }[kind]
    place = {"rows": [64, 64, 4, 2]}

    def step():
        if place["rows"] == [128, 64, 8, 2]:
            raise error

    times = {(64, 64, 4, 2): 3.0, (32, 32, 4, 2): 2.0}
    real = tune.milliseconds

    def measured(step, kernel, repeats):
        known = times.get(tuple(place["rows"]))
        return real(step, kernel, repeats) if known is None else known

    monkeypatch.setattr(tune, "milliseconds", measured)
    tune.fastest("rows", place, "rows", [[128, 64, 8, 2], [32, 32, 4, 2]], step, "row_pass", 3)
    assert place["rows"] == [32, 32, 4, 2]
    assert "row_pass: " in capsys.readouterr().err


def test_a_kernel_counts_for_itself_alone(tune):
    events = [
        SimpleNamespace(name="row_pass_0d1d", device_time_total=5.0),
        SimpleNamespace(name="value_pass_0d1d", device_time_total=7.0),
        SimpleNamespace(name="row_pass_0d1d", device_time_total=6.0),
    ]
    assert tune.kernel_time(events, "row_pass") == 11.0
    with pytest.raises(ValueError, match="no kernel key_grad_pass ran"):
        tune.kernel_time(events, "key_grad_pass")

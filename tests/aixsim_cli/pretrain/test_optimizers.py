"""A step that may not be taken changes nothing, and a few numbers tell of a whole gradient."""

import math

import pytest
import torch
from torch import nn
from torchtitan.config import Optimizer as OptimizerConfig

from aixsim_cli.pretrain.optimizers import build_optimizers, clipped_norm, whole_norm


def gradient(matrix, vector):
    """A linear with a gradient, one number of which is given, clipped to norm 1."""
    model = nn.Linear(4, 3)
    model(torch.ones(2, 4)).sum().backward()
    model.weight.grad[1, 2] = matrix
    model.bias.grad *= vector
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return list(model.parameters())


@pytest.mark.parametrize(
    ("matrix", "vector", "expected"),
    [
        (1.0, 1.0, "a number"),
        (math.nan, 1.0, "nan"),
        # NaN times 0, in the matrix alone
        (math.inf, 1.0, "nan"),
        # no number is infinite, but the sum of their squares is
        (1e30, 1.0, "0"),
        # vectors whose gradient is 0 by itself
        (1.0, 0.0, "a number"),
        (math.nan, 0.0, "nan"),
    ],
)
def test_what_tells_of_a_gradient(matrix, vector, expected):
    parameters = gradient(matrix, vector)
    norm = clipped_norm(parameters).item()
    norm = whole_norm(parameters).item() if norm == 0 else norm
    found = "nan" if math.isnan(norm) else "0" if norm == 0 else "a number"
    assert found == expected


def test_what_may_not_be_taken_changes_nothing():
    model = nn.Linear(4, 3)
    optimizers = build_optimizers([model], OptimizerConfig(implementation="foreach"), None)
    hooks = []
    optimizers.register_step_post_hook(lambda *_: hooks.append(1))

    def step():
        model(torch.ones(2, 4)).sum().backward()
        optimizers.step()
        moments = [s["exp_avg"].clone() for s in optimizers.optimizers[0].state.values()]
        return [model.weight.detach().clone(), *moments]

    first = step()
    optimizers.may_step = lambda: False
    second = step()
    assert len(first) == 3 and all(map(torch.equal, first, second))
    optimizers.may_step = lambda: True
    assert not any(map(torch.equal, first, step()))
    assert len(hooks) == 3

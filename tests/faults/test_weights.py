"""Weights, ranges and moments that are not finite are never saved, and never gone on from."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aixsim_cli.errors import RunError
from aixsim_cli.pretrain import checkpointer, train
from aixsim_cli.run.finite import all_finite, first_nonfinite
from tests.faults.conftest import long, steps

SAID = "weights, ranges or moments are not finite"


def saved(folder):
    return sorted(path.parent.name for path in (folder / "checkpoint").glob("*/manifest.json"))


def after_update(step, spoil):
    """Let `spoil(trainer)` follow the first update of a step, on the last rank."""
    optimize = train.PretrainTrainer.train_step
    done = []

    def fault(self, data):
        check, self._check_weights = self._check_weights, lambda: None
        optimize(self, data)
        self._check_weights = check
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if self.step == step and not done:
            done.append(step)
            if is_last:
                with torch.no_grad():
                    spoil(self)
        check()

    train.PretrainTrainer.train_step = fault


def spoil_weight(trainer):
    weight = list(trainer.model_parts[0].parameters())[-1].detach()
    # an operation of a sharded tensor would be one of all ranks
    getattr(weight, "to_local", lambda: weight)().flatten()[0] = torch.nan


def weight_of_step_2():
    after_update(2, spoil_weight)


def weight_of_step_3():
    after_update(3, spoil_weight)


def weight_of_last_step():
    after_update(4, spoil_weight)


def moment_of_last_step():
    def spoil(trainer):
        (optimizer,) = trainer.optimizers
        next(iter(optimizer.state.values()))["exp_avg_sq"].flatten()[7] = torch.inf

    after_update(4, spoil)


def range_of_last_step():
    def spoil(trainer):
        next(iter(trainer.transform_state.modules.values())).ranges[0, 1] = torch.nan

    after_update(4, spoil)


def no_look_at_weights():
    """A version that saves whatever it has."""
    weight_of_last_step()
    checkpointer.Checkpointer.is_finite = lambda self: True


@pytest.mark.parametrize(
    ("fault", "mode"),
    [
        (weight_of_last_step, "disabled"),
        (weight_of_last_step, "async"),
        pytest.param(moment_of_last_step, "disabled", marks=long),
        pytest.param(range_of_last_step, "disabled", marks=long),
    ],
)
def test_the_last_update_is_looked_at(train, tmp_path, fault, mode):
    said = train(tmp_path / "run", "--checkpoint.async_mode", mode, fault=fault, code=1)
    assert f"step 4: {SAID} after the update" in said
    assert "nothing was saved of it, the newest checkpoint is" in said and "step-2" in said
    assert saved(tmp_path / "run") == ["step-2"]
    assert {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()} == {"step-2"}


def test_without_checkpoints_too(train, tmp_path):
    options = ("--checkpoint.enable", "false")
    said = train(tmp_path / "run", *options, fault=weight_of_last_step, code=1)
    assert "step 4: " in said and "there is no checkpoint; expected a lower" in said


@pytest.mark.parametrize("policy", ["skip", pytest.param("rollback", marks=long)])
def test_an_update_cannot_be_skipped_once_it_is_made(train, tmp_path, policy):
    options = ("--reliability.on_nonfinite", policy)
    said = train(tmp_path / "run", *options, fault=weight_of_last_step)
    assert f"step 4: {SAID} after the update; rolled back to step 2" in said
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 3, 4]
    assert saved(tmp_path / "run") == ["step-2", "step-4"]


@pytest.mark.parametrize("policy", ["skip", pytest.param("rollback", marks=long), "stop"])
def test_weights_that_spoil_the_next_step(train, tmp_path, policy):
    """Between two saves nobody looks at them; the loss tells, and a skip would skip for ever."""
    options = ("--reliability.on_nonfinite", policy)
    code = 1 if policy == "stop" else 0
    said = train(tmp_path / "run", *options, fault=weight_of_step_3, code=code)
    if policy == "stop":
        assert f"step 4: loss is nan; first seen in the output of output. {SAID}" in said
    else:
        assert "step 4: loss or gradient is not finite; rolled back to step 2" in said
        assert steps(tmp_path / "run") == [1, 2, 3, 3, 4]
    assert "step-4" not in saved(tmp_path / "run") or code == 0


def test_nothing_to_roll_back_to(train, tmp_path):
    options = ("--reliability.on_nonfinite", "rollback")
    said = train(tmp_path / "run", *options, fault=weight_of_step_2, code=1)
    assert f"step 2: {SAID} after the update, and there is no checkpoint to roll back to" in said


def test_one_rank_of_two(train, tmp_path):
    options = ("--budget.num_ranks", 2)
    said = train(tmp_path / "run", *options, fault=weight_of_last_step, code=1, ranks=2)
    assert f"step 4: {SAID} after the update" in said
    assert saved(tmp_path / "run") == ["step-2"]


def test_checkpoints_that_were_saved_all_the_same_are_not_gone_on_from(train, tmp_path):
    folder = tmp_path / "run"
    train(folder, fault=no_look_at_weights)
    assert saved(folder) == ["step-2", "step-4"]
    asked = ("--training.steps", 6, "--checkpoint.load_step", 4)
    said = train(folder, *asked, code=2)
    assert "checkpoint.load_step: " in said and "step-4: holds weights, ranges or moments" in said
    said = train(folder, "--training.steps", 6)
    assert f"set aside as {folder}/checkpoint.set-aside/step-4" in said
    assert steps(folder) == [1, 2, 3, 4, 3, 4, 5, 6]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert all(loss == loss for loss in losses)


def test_a_run_whose_only_checkpoint_is_spoilt_does_not_begin_anew(train, tmp_path):
    folder = tmp_path / "run"
    train(folder, "--checkpoint.interval", 100, fault=no_look_at_weights)
    said = train(folder, "--training.steps", 6, code=2)
    assert "no checkpoint is complete: " in said and "step-4: holds weights, ranges or" in said
    assert saved(folder) == ["step-4"]


def model_of(*values):
    model = nn.Linear(2, 2)
    model.weight.data[0, :] = torch.tensor(values[:2])
    return model


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, -1.0), True),
        ((1e38, 1e38), True),
        ((torch.nan, 0.0), False),
        ((torch.inf, -torch.inf), False),
        ((0.0, -torch.inf), False),
    ],
)
def test_all_finite(values, expected):
    model = model_of(*values)
    assert bool(all_finite(model)) is expected
    assert first_nonfinite(model) == (None if expected else "weight")
    # a float16 sum would overflow long before
    assert bool(all_finite(nn.Linear(300, 300).half().requires_grad_(False))) is True


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([[torch.inf, -torch.inf]], True),
        ([[-1.0, 2.0], [0.0, 0.0]], True),
        ([[torch.inf, 2.0]], False),
        ([[-torch.inf, torch.inf]], False),
        ([[torch.nan, 1.0]], False),
        ([[2.0, 1.0]], False),
    ],
)
def test_ranges_are_set_or_not(ranges, expected):
    model = nn.Linear(2, 2)
    model.register_buffer("ranges", torch.tensor(ranges))
    assert bool(all_finite(model)) is expected


def test_moments():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert bool(all_finite(model, [optimizer]))
    optimizer.state[model.weight]["exp_avg"][0, 0] = torch.nan
    assert bool(all_finite(model)) and not bool(all_finite(model, [optimizer]))


@pytest.mark.parametrize("part", ["weight", "moment", None])
def test_of_the_other_trainer_too(tmp_path, part):
    from aixsim_cli.continual.trainer import SimulationTrainer

    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    optimizer.step()
    if part == "weight":
        model.weight.data[0, 0] = torch.inf
    if part == "moment":
        optimizer.state[model.weight]["exp_avg_sq"][0, 0] = torch.inf
    trainer = SimpleNamespace(
        model=model,
        optimizer=optimizer,
        state=SimpleNamespace(global_step=3),
        args=SimpleNamespace(output_dir=str(tmp_path)),
    )
    with pytest.raises(RunError, match="not finite at step 3") if part else nullcontext():
        SimulationTrainer.check_weights(trainer)  # pyright: ignore

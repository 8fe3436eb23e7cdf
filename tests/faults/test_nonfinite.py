"""A loss that is not finite: stop, skip the step, or roll back to the last checkpoint.

Of both trainers, by one table: six steps, a checkpoint every two, and NaN in some of the steps.
"""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from aixsim_cli.models.titan.saved import read_checkpoint
from aixsim_cli.pretrain.trainer import PretrainTrainer
from tests.faults.conftest import long, make_model

STEPS = 6
BAD = "loss or gradient is not finite"


def nan_in(*steps, gradient=False):
    """Spoil the loss on rank 0, or all gradients, in steps counted from the process's start.

    So that a run that was rolled back does not meet the same one again.
    """
    count = 0

    def fault(trainer_class, name, spoil):
        real = getattr(trainer_class, name)

        def call(self, *arguments, **keywords):
            nonlocal count
            count += 1
            loss = real(self, *arguments, **keywords)
            if count in steps and gradient:
                weights = self.model_parts[0] if hasattr(self, "model_parts") else self.model
                next(weights.parameters()).grad.flatten()[3] = torch.inf
            elif count in steps and os.environ.get("RANK", "0") == "0":
                return spoil(self, loss)
            return loss

        setattr(trainer_class, name, call)

    def spoil_titan(self, loss):
        self._losses[-1] = loss.detach() * torch.nan
        return loss

    fault(PretrainTrainer, "forward_backward_step", spoil_titan)
    fault(Trainer, "training_step", lambda self, loss: loss * torch.nan)


class Pretrain:
    """`aixsim pretrain`, and what it leaves."""

    limit = "reliability.max_nonfinite"

    def __init__(self, aixsim, folder):
        self.aixsim, self.config = aixsim, folder / "c.yaml"
        aixsim(
            "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
            "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", STEPS, "--learning-rate",
            "1e-3", "--mixed-precision-param", "float32", "--keep-last-k-ckpts", 0,
            "--save-path", self.config, "--transform-config", "configs/transforms/optical.yaml",
        )  # fmt: skip

    def run(self, folder, action, limit=10, interval=2, ranks=1, **how):
        layout = ("--budget.num_ranks", ranks, "--training.local_batch_size", 2 // ranks)
        return self.aixsim(
            "pretrain", "--config", self.config, "--job.dump_folder", folder,
            "--metrics.log_freq", 1, "--checkpoint.interval", interval,
            "--reliability.on_nonfinite", action, "--reliability.max_nonfinite", limit, *layout,
            ranks=ranks, **how,
        ).stderr  # fmt: skip

    resume = run

    def records(self, folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"], r["lr"]) for r in map(json.loads, lines)]

    def saved(self, folder):
        return sorted(int(p.parent.name[5:]) for p in folder.glob("checkpoint/*/manifest.json"))

    def forget(self, folder, step):
        shutil.rmtree(folder / "checkpoint" / f"step-{step}")

    def weights(self, folder, step):
        found = read_checkpoint(folder / "checkpoint" / f"step-{step}").state_dict
        return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


class Continual:
    """`aixsim continual-pretrain`, and what it leaves."""

    limit = "--max_nonfinite"

    def __init__(self, aixsim, folder):
        self.aixsim, self.model = aixsim, folder / "model"
        make_model(self.model)

    def run(self, folder, action, *flags, limit=10, interval=2, ranks=1, **how):
        return self.aixsim(
            "continual-pretrain", "--model_name_or_path", self.model, "--dataset_name", "builtin",
            "--max_train_samples", 8, "--do_train", "--max_steps", STEPS, "--save_steps", interval,
            "--logging_steps", 1, "--block_size", 32, "--per_device_train_batch_size", 2 // ranks,
            "--learning_rate", "1e-2", "--report_to", "none", "--disable_tqdm", "true",
            "--transform_config", "configs/transforms/optical.yaml", "--output_dir", folder,
            "--on_nonfinite", action, "--max_nonfinite", limit, *flags, ranks=ranks, **how,
        ).stderr  # fmt: skip

    def resume(self, folder, action):
        return self.run(folder, action, "--resume_from_checkpoint", "true")

    def records(self, folder):
        found = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [(r["step"], r["loss"], r["learning_rate"]) for r in found if "loss" in r]

    def saved(self, folder):
        return sorted(int(p.parent.name[11:]) for p in folder.glob("checkpoint-*/manifest.json"))

    def forget(self, folder, step):
        shutil.rmtree(folder / f"checkpoint-{step}")
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()

    def weights(self, folder, step):
        return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


@pytest.fixture(scope="module", params=[Pretrain, Continual])
def trainer(request, aixsim, tmp_path_factory):
    return request.param(aixsim, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def plain(trainer, tmp_path_factory):
    """The records of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("plain")
    trainer.run(folder / "run", "stop")
    return trainer.records(folder / "run")


# action, limit, steps that are NaN, exit code, what is said, steps that are recorded
TABLE = {
    "skip": ("skip", 10, (4,), 0, f"step 4: {BAD}; skipped (1 of at most 10", [1, 2, 3, 5, 6]),
    "rollback": (
        "rollback", 10, (4,), 0, "rolled back to step 2, on with the data that follow",
        [1, 2, 3, 3, 4, 5, 6],
    ),
    "nothing to go back to": (
        "rollback", 10, (1,), 1, f"step 1: {BAD}, and there is no checkpoint to roll back to", None,
    ),
    # the checkpoint of step 2 begins the count anew
    "skips have a limit": (
        "skip", 1, (1, 3, 4), 1, f"step 4: {BAD}, 2 times since the last checkpoint", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_what_the_policy_says(trainer, plain, tmp_path, case):
    action, limit, steps, code, words, recorded = TABLE[case]
    said = trainer.run(
        tmp_path / "o", action, limit=limit, fault=partial(nan_in, *steps), code=code
    )
    assert words in said
    assert (f"{trainer.limit} allows {limit}" in said) == ("limit" in case)
    if recorded is None:
        return
    records = trainer.records(tmp_path / "o")
    assert [step for step, *_ in records] == recorded
    assert records[:3] == plain[:3]
    # on weights that lack an update, or on other data
    assert records[3][1] not in [loss for _, loss, _ in plain]
    # the schedule is of the step
    assert all(rate == plain[step - 1][2] for step, _, rate in records)
    assert trainer.saved(tmp_path / "o") == [2, 4, 6]


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=long)])
def test_stop_leaves_the_last_checkpoint(trainer, tmp_path, gradient):
    fault = partial(nan_in, 4, gradient=gradient)
    said = trainer.run(tmp_path / "o", "stop", fault=fault, code=1)
    if isinstance(trainer, Pretrain):
        what = "gradient norm" if gradient else "loss"
        assert f"step 4: {what} is nan" in said
        assert "The weights of step 3 were not changed" in said
        assert [step for step, *_ in trainer.records(tmp_path / "o")] == [1, 2, 3]
    else:
        assert f"{BAD} at step 4; nothing was saved of it, the newest complete checkpoint" in said
    assert trainer.saved(tmp_path / "o") == [2]


def test_a_skipped_step_changes_nothing(trainer, tmp_path):
    folder = tmp_path / "o"
    trainer.run(folder, "skip", interval=1, fault=partial(nan_in, 3, gradient=True))
    two, three, four = (trainer.weights(folder, step) for step in (2, 3, 4))
    assert any(name.endswith("ranges") for name in two)
    for name, before in two.items():
        assert torch.equal(before, three[name]), name
    assert any(not torch.equal(four[name], three[name]) for name in three)


def test_what_was_rolled_back_goes_on_bit_for_bit(trainer, tmp_path):
    folder = tmp_path / "o"
    # twice: then the data last for more epochs than the steps
    trainer.run(folder, "rollback", fault=partial(nan_in, 4, 5))
    records, weights = trainer.records(folder), trainer.weights(folder, STEPS)
    trainer.forget(folder, STEPS)
    trainer.resume(folder, "stop")
    # the data too: as far behind the weights' step as they were
    assert trainer.records(folder)[-2:] == records[-2:]
    found = trainer.weights(folder, STEPS)
    assert all(torch.equal(weights[name], found[name]) for name in weights)


@pytest.mark.parametrize("action", ["skip", pytest.param("rollback", marks=long)])
def test_both_ranks_act_on_the_loss_of_one(trainer, tmp_path, action):
    said = trainer.run(tmp_path / "o", action, ranks=2, fault=partial(nan_in, 4))
    went = "skipped" if action == "skip" else "rolled back to step 2"
    assert said.count(f"step 4: {BAD}; {went}") == 1
    recorded = TABLE[action][-1]
    assert [step for step, *_ in trainer.records(tmp_path / "o")] == recorded
    assert trainer.saved(tmp_path / "o") == [2, 4, 6]


@pytest.mark.parametrize("key, value", [("on_nonfinite", "ignore"), ("max_nonfinite", -1)])
def test_wrong_values_are_named(trainer, tmp_path, key, value):
    how = {"action": "skip", "limit": 10}
    how["action" if key == "on_nonfinite" else "limit"] = value
    said = trainer.run(tmp_path / "o", **how, code=2)
    assert key in said and str(value) in said


@pytest.mark.parametrize(
    "flags",
    [("--streaming", "true"), ("--save_only_model", "true"), ("--optim", "lomo")],
    ids="".join,
)
def test_what_no_step_can_be_left_out_of_is_refused(aixsim, tmp_path, flags):
    done = aixsim(
        "continual-pretrain", "--model_name_or_path", "x", "--dataset_name", "builtin",
        "--do_train", "--max_steps", 2, "--output_dir", tmp_path / "o", "--on_nonfinite", "skip",
        *flags, code=2,
    )  # fmt: skip
    assert f"--on_nonfinite: got skip; expected stop with {flags[0]}" in done.stderr

"""Learning rates side by side: sweep_lr.py OUT RATE … -- FLAGS of continual-pretrain.

Every rate is a trial of an optuna study kept in OUT/study.log. A trial that diverges is recorded
and the next one starts; a sweep that was stopped goes on, from the stopped trial's checkpoint.
Ends in OUT/table.md and OUT/loss.png: held-out loss by learning rate.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState


class TrialFailed(Exception):
    """A run that ended with an error; its last line is the message."""


def main() -> None:
    words = sys.argv[1:]
    if len(words) < 2 or "--" not in words:
        sys.exit(__doc__)
    split = words.index("--")
    out, rates, flags = Path(words[0]), [float(w) for w in words[1:split]], words[split + 1 :]
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
        study_name=out.name,
        load_if_exists=True,
    )
    previous = study.user_attrs.get("flags", flags)
    if previous != flags:
        sys.exit(f"{out}: was swept with other flags: {' '.join(previous)}; expected a new folder")
    study.set_user_attr("flags", flags)
    done = {trial.params["learning_rate"] for trial in study.trials if _ended(trial)}
    for rate in [rate for rate in rates if rate not in done]:
        trial = study.ask({"learning_rate": FloatDistribution(rate, rate, log=True)})
        try:
            study.tell(trial, _train(rate, out / f"lr-{rate:g}", flags))
        except TrialFailed as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL)
    rows = sorted((t for t in study.trials if _ended(t)), key=lambda t: t.params["learning_rate"])
    _write_table(rows, out)
    _plot(rows, out / "loss.png")


def _ended(trial: FrozenTrial) -> bool:
    # a trial that was killed is still running, says the log
    return trial.state == TrialState.COMPLETE or "error" in trial.user_attrs


def _train(rate: float, folder: Path, flags: list[str]) -> float:
    # of this interpreter, whatever is on PATH
    command = [sys.executable, "-m", "aixsim_cli", "continual-pretrain", *flags]
    command += ["--learning_rate", f"{rate:g}", "--output_dir", str(folder)]
    if any(folder.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "true"]
    print(f"learning rate {rate:g}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(lines[-1], file=sys.stderr)
        if done.returncode in (2, 75, 130):
            # a mistake in the flags, or a signal: not a run that diverged
            sys.exit(done.returncode)
        raise TrialFailed(lines[-1])
    return json.loads((folder / "eval_results.json").read_text())["eval_loss"]


def _write_table(rows: list[FrozenTrial], out: Path) -> None:
    lines = ["| learning rate | held-out loss | perplexity |", "|---|---|---|"]
    for trial in rows:
        rate = trial.params["learning_rate"]
        if trial.value is None:
            lines.append(f"| {rate:g} | diverged | {trial.user_attrs['error']} |")
        else:
            lines.append(f"| {rate:g} | {trial.value:.4f} | {math.exp(trial.value):.2f} |")
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    print(text, end="")


def _plot(rows: list[FrozenTrial], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    good = [(t.params["learning_rate"], t.value) for t in rows if t.value is not None]
    if good:
        axes.plot(*zip(*good, strict=True), "o-", label="held-out loss")
    for trial in rows:
        if trial.value is None:
            axes.axvline(trial.params["learning_rate"], color="red", linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (dotted: diverged)")
    axes.set_ylabel("held-out loss, nats per token")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

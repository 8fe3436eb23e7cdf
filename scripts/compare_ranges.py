"""Rules for the ranges, side by side: each cell is a text, a length, a rate, a flavor and a seed.

    compare_ranges.py OUT --text wikitext=train.txt,heldout.txt --rule field=smooth-0.9.yaml …

Every rule is trained in every cell, and digitally, from the same seed on the same data; then its
held-out loss is measured on the hardware that it was trained on. A row of OUT/rows.jsonl is one
run: what is there is not run again, so a comparison that was stopped goes on; other files or steps
than those of OUT/settings.json are refused. Ends in a table: the mean over seeds of what a rule
loses to digital, held out, held out with ranges set anew from 8 batches of the training text, and
in each quarter of the training.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

DIGITAL = "digital"


@dataclass(frozen=True)
class Run:
    """One training: a cell, and the rule that it is trained with."""

    text: str
    seq_len: int
    rate: float
    flavor: str
    ranks: int
    accumulate: int
    seed: int
    rule: str

    @property
    def cell(self) -> tuple[str, int, float, str, int, int]:
        return self.text, self.seq_len, self.rate, self.flavor, self.ranks, self.accumulate

    @property
    def name(self) -> str:
        return "-".join(map(str, (*self.cell, self.seed, self.rule))).replace("/", "-")


def main(
    out: Path,
    text: Annotated[list[str], typer.Option(help="NAME=TRAIN.txt,HELDOUT.txt or NAME=builtin")],
    rule: Annotated[list[str], typer.Option(help="NAME=TRANSFORM.yaml")],
    seq_len: Annotated[list[int], typer.Option()] = [256],  # noqa: B006
    rate: Annotated[list[float], typer.Option()] = [3e-3],  # noqa: B006
    flavor: Annotated[list[str], typer.Option(help="FLAVOR, or ARCH/FLAVOR")] = ["debug"],  # noqa: B006
    tokenizer: Annotated[str, typer.Option(help="Of all runs of OUT.")] = "builtin",
    ranks: Annotated[int, typer.Option(help="Processes that share a step.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    seed: Annotated[list[int], typer.Option()] = [1, 2, 3],  # noqa: B006
    steps: int = 400,
    tokens_per_step: int = 2048,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
) -> None:
    texts = {name: paths.split(",") for name, _, paths in (t.partition("=") for t in text)}
    for name, paths in texts.items():
        if (len(paths) == 2) == ("builtin" in paths):
            raise typer.BadParameter(f"--text {name}: expected TRAIN,HELDOUT or builtin")
    if any(tokens_per_step % (length * ranks * accumulate) for length in seq_len):
        raise typer.BadParameter("--tokens-per-step: expected sequences for every micro-batch")
    rules = {name: path for name, _, path in (r.partition("=") for r in rule)}
    out.mkdir(parents=True, exist_ok=True)
    given: dict[str, object] = {f"--text {name}": paths for name, paths in texts.items()}
    given |= {f"--rule {name}": Path(path).read_text() for name, path in rules.items()}
    _agree(out, given | {"--steps": steps, "--tokens-per-step": tokens_per_step,
                         "--tokenizer": tokenizer})  # fmt: skip
    rows = out / "rows.jsonl"
    done = {run for run, _ in _read(rows)}
    cells = product(texts, seq_len, rate, flavor, [ranks], [accumulate])
    # the seeds last: each row of the table is full before the next one begins
    wanted = [Run(*cell, one, name) for cell in cells for one in seed for name in (DIGITAL, *rules)]

    def train(run: Run) -> None:
        found = _train(run, out / run.name, texts[run.text], rules.get(run.rule), tokenizer,
                       steps, tokens_per_step)  # fmt: skip
        with rows.open("a") as file:
            file.write(json.dumps(asdict(run) | found) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, [run for run in wanted if run not in done]))
    for line in _table(dict(_read(rows)), rules):
        print(line)


def _agree(out: Path, given: dict[str, object]) -> None:
    """Refuse what would be taken for a run of this folder, and is another."""
    path = out / "settings.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for name, value in given.items():
        if known.get(name, value) != value:
            raise typer.BadParameter(f"{name}: {out} holds runs with {known[name]!r}")
    path.write_text(json.dumps(known | given, indent=1))


def _train(
    run: Run,
    folder: Path,
    texts: list[str],
    transform: str | None,
    tokenizer: str,
    steps: int,
    per_step: int,
) -> dict:
    data = [
        ["--dataset", "builtin"]
        if path == "builtin"
        else ["--dataset", "local", "--dataset-path", path]
        for path in (texts[0], texts[-1])
    ]
    config = f"{folder}.yaml"
    words = ["--transform-config", transform] if transform else []
    sequences = per_step // run.seq_len
    arch, _, flavor = run.flavor.rpartition("/")
    _aixsim(
        "generate-cfg", "--model-arch", arch or "aixsim", "--model-flavor", flavor,
        "--tokenizer-path", tokenizer, *data[0],
        "--batch-size", sequences, "--seq-len", run.seq_len, "--steps", steps,
        "--learning-rate", run.rate, "--seed", run.seed, "--mixed-precision-param", "float32",
        "--save-path", config, "--force", *words,
    )  # fmt: skip
    _aixsim(
        "pretrain", "--config", config, "--job.dump_folder", folder, "--metrics.log_freq", 1,
        "--training.local_batch_size", sequences // run.ranks // run.accumulate,
        "--training.global_batch_size", sequences, ranks=run.ranks,
    )  # fmt: skip
    evaluate = ("eval", "ppl", folder / "checkpoint" / f"step-{steps}", *data[1], "--json")
    evaluate += ("--num-batches", 60)
    found = {"nll": json.loads(_aixsim(*evaluate))["nll"]}
    if transform:
        words = ["--calibration-path", texts[0]] if texts[0] != "builtin" else []
        found["anew"] = json.loads(_aixsim(*evaluate, "--recalibrate", *words))["nll"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    quarter = steps // 4
    losses = [mean(r["loss"] for r in log[i * quarter : (i + 1) * quarter]) for i in range(4)]
    return found | {"quarters": losses, "seconds": log[-1]["seconds"]}


def _aixsim(*words: object, ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "aixsim_cli"]
    command += map(str, words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def _read(rows: Path) -> Iterator[tuple[Run, dict]]:
    for line in rows.read_text().splitlines() if rows.is_file() else ():
        row = json.loads(line)
        yield Run(**{name: row.pop(name) for name in Run.__dataclass_fields__}), row


def _percent(gaps: Iterable[float]) -> str:
    return ", ".join(f"{gap:+.2%}" for gap in gaps)


def _table(found: dict[Run, dict], rules: dict[str, str]) -> Iterator[str]:
    yield (
        "| text | length | rate | flavor | ranks | micro-batches | rule | held out | each seed "
        "| ranges set anew | in each quarter |"
    )
    yield "|" + "---|" * 11
    for cell in sorted({run.cell for run in found}):
        for rule in rules:
            runs = [r for r in found if r.cell == cell and r.rule == rule]
            pairs = [
                (found[r], found[digital])
                for r in runs
                if (digital := Run(*cell, r.seed, DIGITAL)) in found
            ]
            if not pairs:
                continue
            gaps = [mine["nll"] / theirs["nll"] - 1 for mine, theirs in pairs]
            anew = [mine["anew"] / theirs["nll"] - 1 for mine, theirs in pairs]
            quarters = [
                mean(mine["quarters"][i] / theirs["quarters"][i] - 1 for mine, theirs in pairs)
                for i in range(4)
            ]
            columns = [*map(str, cell), rule, _percent([mean(gaps)]), _percent(gaps)]
            columns += [_percent([mean(anew)]), _percent(quarters)]
            yield f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    typer.run(main)

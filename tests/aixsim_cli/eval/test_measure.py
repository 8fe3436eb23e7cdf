"""Post-transform evaluation, comparisons and lm-eval on small local models."""

import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aixsim_cli.errors import RunError, UserError
from aixsim_cli.eval.calibrate import calibrate, needs_calibration
from aixsim_cli.eval.measure import Calibration, Text, measure
from aixsim_cli.eval.perplexity import Perplexity
from aixsim_cli.main import app
from aixsim_cli.models.hf.saved import ranges_of
from aixsim_cli.models.load import load_model
from aixsim_cli.transforms.choice import read_choice

TEXT = Text("builtin", None, 2, 2, None)


@pytest.mark.parametrize("nll", [float("nan"), float("inf"), 800.0])
def test_what_is_not_finite_is_null_in_json_and_a_dash_in_the_table(clean, monkeypatch, nll):
    monkeypatch.setattr("aixsim_cli.eval.measure.perplexity", lambda *_, **__: Perplexity(10, nll))
    run = CliRunner()
    done = run.invoke(app, ["eval", "ppl", clean, "--json"])
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))
    assert found["perplexity"] is None and found["nll"] == (nll if math.isfinite(nll) else None)
    # what came to no number is shown, and is a failure
    is_failure = not math.isfinite(nll)
    assert isinstance(done.exception, RunError) == is_failure
    done = run.invoke(app, ["eval", "compare", clean, clean])
    assert "nan%" not in done.stdout and done.stdout.count("-") > 2, done.stdout
    assert isinstance(done.exception, RunError) == is_failure


def test_a_loss_that_is_not_finite_is_a_failure(aixsim, clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = aixsim("eval", "ppl", folder, "--num-batches", 1, code=1)
    assert "perplexity nan" in done.stdout or "perplexity inf" in done.stdout
    assert f"run failed: {folder}: the loss is not finite, though every weight" in done.stderr
    done = aixsim(
        "continual-pretrain", "--model_name_or_path", folder, "--dataset_name", "builtin",
        "--do_eval", "--max_eval_samples", 2, "--block_size", 16, "--report_to", "none",
        "--output_dir", tmp_path / "out", code=1,
    )  # fmt: skip
    assert "the loss of the evaluation is not finite" in done.stderr


def test_a_clean_model_is_calibrated_and_says_so(clean, coarse, caplog):
    record = measure(clean, TEXT, Calibration(3, None), read_choice(coarse))
    assert record["calibrated"] and record["transform"] == "optical"
    assert "ranges set on 3 batches of builtin's training part" in caplog.text


def test_a_trained_model_is_not_calibrated(trained):
    assert not measure(trained, TEXT, Calibration(3, None))["calibrated"]


def test_recalibrating_forgets_the_ranges_of_the_training(clean, trained, coarse, caplog):
    as_trained = measure(trained, TEXT, Calibration(3, None))
    record = measure(trained, TEXT, Calibration(3, None, anew=True))
    assert record["calibrated"]
    assert "its ranges are set anew: ranges set on 3 batches" in caplog.text
    # the same weights, in ranges of the same batches
    expected = measure(clean, TEXT, Calibration(3, None), read_choice(coarse))
    assert record["nll"] == expected["nll"] != as_trained["nll"]
    caplog.clear()
    assert not measure(clean, TEXT, Calibration(3, None, anew=True))["calibrated"]
    assert "--recalibrate: the model is digital" in caplog.text
    run = CliRunner()
    words = ["--num-batches", "2", "--batch-size", "2", "--recalibrate", "--json"]
    done = run.invoke(app, ["eval", "ppl", trained, "--calibration-batches", "3", *words])
    assert json.loads(done.stdout)["nll"] == record["nll"]
    done = run.invoke(app, ["eval", "compare", trained, "--calibration-batches", "3", *words])
    assert json.loads(done.stdout)[0]["nll"] == record["nll"]
    local = ["--dataset", "local", "--dataset-path", __file__]
    done = run.invoke(app, ["eval", "ppl", trained, *local, "--recalibrate"])
    assert "its ranges are set anew, and ranges must be set on text other" in str(done.exception)


def test_calibration_covers_its_batches_and_changes_nothing_else(clean, coarse):
    model = load_model(clean, read_choice(coarse))
    weights = {k: v.clone() for k, v in model.module.named_parameters()}
    windows = [(torch.full((32,), token), torch.zeros(32)) for token in (5, 6, 7)]
    assert needs_calibration(model)
    calibrate(model, windows, batch_size=1, num_batches=2)
    assert not needs_calibration(model) and not model.module.training
    assert not any(m.training for m in model.state.modules.values())
    assert all(torch.equal(v, weights[k]) for k, v in model.module.named_parameters())
    # inputs of the first layer: the normed embeddings of tokens 5 and 6, and not of 7
    embedded = model.module.model.embed_tokens(torch.tensor([5, 6]))
    inputs = model.module.model.layers[0].input_layernorm(embedded)
    found = ranges_of(model.module)["model.layers.0.self_attn.q_proj.ranges"][0]
    assert torch.allclose(found, torch.stack([inputs.min(), inputs.max()]), rtol=1e-6)
    before = {k: v.clone() for k, v in ranges_of(model.module).items()}
    calibrate(model, windows[2:], batch_size=1, num_batches=1)
    assert all(torch.equal(v, before[k]) for k, v in ranges_of(model.module).items())


def test_a_trained_model_in_little_light_keeps_its_ranges_and_sets_lamps(trained, tmp_path):
    path = tmp_path / "light.yaml"
    path.write_text("layer_name_to_config: {default: {photons_per_mac: 2.0}}\n")
    own = ranges_of(load_model(trained).module)
    model = load_model(trained, read_choice(path))
    before = {k: v.clone() for k, v in ranges_of(model.module).items()}
    lamps = [name for name in before if name.endswith(".lamp.ranges")]
    assert len(lamps) == len(own) and before.keys() - lamps == own.keys()
    assert all(torch.equal(before[name], own[name]) for name in own)
    assert not any(before[name].isfinite().any() for name in lamps)
    assert needs_calibration(model)
    windows = [(torch.full((32,), token), torch.zeros(32)) for token in (5, 6)]
    calibrate(model, windows, batch_size=1, num_batches=2)
    after = ranges_of(model.module)
    assert not needs_calibration(model)
    assert all(torch.equal(after[name], own[name]) for name in own)
    # the means of two batches lie between them
    assert all((after[name][:, 0] <= after[name][:, 1]).all() for name in lamps)
    assert any((after[name][:, 0] < after[name][:, 1]).any() for name in lamps)


def test_local_text_needs_other_text_to_calibrate_on(clean, coarse, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one two three four five " * 100)
    text = Text("local", str(path), 2, 1, None)
    with pytest.raises(UserError, match="--calibration-path: missing"):
        measure(clean, text, Calibration(1, None), read_choice(coarse))
    assert measure(clean, text, Calibration(1, str(path)), read_choice(coarse))["calibrated"]


def test_compare(aixsim, clean, trained, coarse, tmp_path):
    plot = tmp_path / "plots" / "p.png"
    done = aixsim(
        "eval", "compare", clean, trained, "--transform-config", coarse, "--no-transform",
        "--num-batches", 2, "--batch-size", 2, "--json", "--plot", plot,
    )  # fmt: skip
    records = json.loads(done.stdout)
    found = [(r["source"], r["transform"], r["calibrated"]) for r in records]
    assert found == [
        (clean, None, False),
        (clean, "optical", True),
        (trained, "optical", False),
        (trained, None, False),
        (trained, "optical", False),
    ]
    # the weights are the same, and the tokens
    assert records[0]["nll"] == records[3]["nll"]
    assert {r["tokens"] for r in records} == {128}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_refuses_a_picture_it_cannot_write(aixsim, clean):
    done = aixsim("eval", "compare", clean, "--plot", "p.txt", code=2)
    assert "--plot: got p.txt; expected a .png" in done.stderr


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_no_picture_or_result_takes_the_place_of_another(aixsim, clean, tmp_path, there):
    plot, results = tmp_path / "p.png", tmp_path / "out" / "results.json"
    results.parent.mkdir()
    for path in (plot, results):
        if there == "file":
            path.write_text("mine")
        elif there == "folder":
            path.mkdir()
        else:
            path.symlink_to(tmp_path / "nowhere")
    done = aixsim("eval", "compare", clean, "--plot", plot, code=2)
    assert f"--plot: {plot}: exists; expected a new file" in done.stderr
    command = ("eval", "lm-eval", clean, "--tasks", "wikitext", "--output", results.parent)
    done = aixsim(*command, code=2)
    assert f"--output: {results}: exists; expected a new file" in done.stderr
    assert there != "file" or plot.read_text() == results.read_text() == "mine"


def test_compare_asks_for_matplotlib_before_anything_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["eval", "compare", "nowhere", "--plot", "p.png"])
    assert isinstance(done.exception, UserError)
    assert "--plot: matplotlib is not installed" in str(done.exception)


def test_the_table_says_what_is_compared_to_the_first_row(monkeypatch):
    from aixsim_cli.eval import measure as module

    def measured(source, *_, **__):
        nll = {"a": 6.0, "b": 3.0}[source]
        return {
            "source": source, "transform": None, "transform_config": None, "calibrated": False,
            "tokens": 10, "nll": nll, "perplexity": math.exp(nll), "seq_len": 8,
        }  # fmt: skip

    monkeypatch.setattr(module, "measure", measured)
    lines = CliRunner().invoke(app, ["eval", "compare", "a", "b"]).stdout.splitlines()
    cells = [[cell.strip() for cell in re.split("[┃│]", line)] for line in lines]
    assert cells[1][4:7] == ["nll", "perplexity", "nll to first"]
    assert cells[4][4:7] == ["3.00000", "20.0855", "-50.00%"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """lm-eval tasks over local data, of both kinds of request."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [
        *("the", "a", "value", "of", "an", "expression", "is"),
        *("its", "result", "when", "it", "ends"),
    ]
    rows = [{"page": " ".join(words[i:] + words[:i]) * (1 + i % 3)} for i in range(6)]
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [
        {"q": w, "choices": [f" {w}", " the value"], "gold": i % 2} for i, w in enumerate(words)
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = "test_split: test\ndataset_path: json\n"
    (folder / "pages.yaml").write_text(
        f"task: local_pages\n{common}"
        f"dataset_kwargs: {{data_files: {{test: {folder}/pages.jsonl}}}}\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    (folder / "choice.yaml").write_text(
        f"task: local_choice\n{common}"
        f"dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    return folder


@pytest.fixture
def lm_eval(aixsim, tasks, tmp_path):
    count = itertools.count()

    def run(source, *flags, names="local_pages,local_choice"):
        output = tmp_path / f"out{next(count)}"
        run.done = aixsim(
            "eval", "lm-eval", source, "--tasks", names, "--include-path", tasks,
            "--output", output, *flags,
        )  # fmt: skip
        return json.loads((output / "results.json").read_text())

    return run


def numbers(result):
    return {
        (task, metric): value
        for task, row in result["results"].items()
        for metric, value in row.items()
        if isinstance(value, float)
    }


def test_lm_eval_does_not_depend_on_the_batch_or_the_other_requests(lm_eval, trained):
    one = numbers(lm_eval(trained, "--batch-size", 1))
    four = numbers(lm_eval(trained, "--batch-size", 4))
    alone = numbers(lm_eval(trained, names="local_choice"))
    assert one == four and ("local_pages", "bits_per_byte,none") in one
    assert alone.items() <= one.items()


def test_lm_eval_repeats_over_noise_seeds(lm_eval, trained):
    result = lm_eval(trained, "--repeats", 3, names="local_pages")
    found = result["repeats"]["local_pages"]["bits_per_byte,none"]
    assert len(set(found["values"])) == 3 and found["stdev"] > 0
    assert found["mean"] == pytest.approx(sum(found["values"]) / 3)
    shown = result["results"]["local_pages"]
    assert shown["bits_per_byte,none"] == found["mean"]
    assert not [key for key in shown if "stderr" in key]
    table = lm_eval.done.stdout
    assert "|Stdev |" in table and "Stderr" not in table
    assert re.search(rf"\| *{found['mean']:.4f}\|± *\| *{found['stdev']:.4f}\|", table)
    assert "standard deviation over 3 noise seeds" in table
    # lm-eval's remarks about a model that it did not load
    assert "already-initialized" not in lm_eval.done.stderr
    assert "not of type" not in lm_eval.done.stderr


def test_groups_of_repeats_are_means_too(monkeypatch):
    from aixsim_cli.eval import harness

    def one_run(model, **_):
        row = {"alias": "g", "acc,none": float(model.noise_seed), "acc_stderr,none": "N/A"}
        return {"results": {"g": row, "t": dict(row)}, "groups": {"g": dict(row)}}

    class Anything:
        def __init__(self, *_, noise_seed=0, **__):
            self.noise_seed, self.state, self.all_tasks = noise_seed, object(), ["g"]

    for name in ("SimulatedLM", "TaskManager"):
        monkeypatch.setattr(harness, name, Anything)
    monkeypatch.setattr(harness, "simple_evaluate", one_run)
    result = harness.evaluate(Anything(), ["g"], repeats=3)
    assert result["groups"] == {"g": {"alias": "g", "acc,none": 1.0}}
    assert result["repeats"]["g"]["acc,none"]["values"] == [0.0, 1.0, 2.0]


def test_lm_evals_own_command_knows_our_model(aixsim, trained, tasks, lm_eval):
    done = aixsim(
        "eval", "lm-eval", "--", "run", "--model", "aixsim", "--model_args",
        f"pretrained={trained}", "--tasks", "local_pages", "--include_path", tasks,
    )  # fmt: skip
    expected = lm_eval(trained, names="local_pages")["results"]["local_pages"]["bits_per_byte,none"]
    shown = re.search(r"bits_per_byte\|↓  \|\s*([\d.]+)\|", done.stdout)
    assert shown is not None and float(shown.group(1)) == pytest.approx(expected, abs=1e-4)


def test_lm_evals_own_command_calibrates(clean, coarse):
    from aixsim_cli.eval.harness import SimulatedLM

    lm = SimulatedLM(clean, transform_config=coarse)
    assert lm.simulated.transform.name == "optical" and not needs_calibration(lm.simulated)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "no_such_task"], "--tasks: lm-eval knows no no_such_task"),
        ([], "--tasks: missing"),
        (["--tasks", "x", "--include-path", "nowhere"], "--include-path: nowhere: no such folder"),
    ],
)
def test_lm_eval_mistakes(aixsim, clean, flags, message):
    assert message in aixsim("eval", "lm-eval", clean, *flags, code=2).stderr


@pytest.mark.parametrize("length", [33, 10**12])
def test_windows_longer_than_the_model_reads_are_refused(clean, length):
    with pytest.raises(UserError, match=rf"--seq-len: got {length}; expected at most 32, the pos"):
        measure(clean, replace(TEXT, seq_len=length), Calibration(1, None))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", ","], "--tasks: got ','; expected names"),
        (["--tasks", "x", "--limit", "0"], "--limit: got 0.0; expected more than 0"),
    ],
)
def test_what_would_score_nothing_is_refused(clean, options, said):
    done = CliRunner().invoke(app, ["eval", "lm-eval", clean, *options])
    assert isinstance(done.exception, UserError) and said in str(done.exception)


def test_compare_adds_light_and_energy_of_what_each_row_is(aixsim, clean, trained, tmp_path):
    lit = tmp_path / "lit.yaml"
    lit.write_text("transform: optical\nfc: {photons_per_mac: 3}\n")
    words = ("eval", "compare", clean, trained, "--transform-config", lit, "--num-batches", 1)
    words += ("--batch-size", 1, "--energy", "engineered")
    found = json.loads(aixsim(*words, "--json").stdout)
    light = [record["photons_per_token"] for record in found]
    # of all linears but the head, 2 x (3 x 32^2 and 2 x 32 x 16 and 3 x 32 x 64) and 3 each
    macs = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert light == [None, 3 * macs, None, 3 * macs]
    digital, *others = (record["joules_per_token"][1] for record in found)
    assert others[0] == others[2] != others[1] != digital
    table = aixsim(*words).stdout
    assert "photons/token" in table and "energy/token" in table and "µJ (" in table


def test_compare_asks_for_the_price_list_before_anything_else(aixsim):
    done = aixsim("eval", "compare", "nowhere", "--energy", "engineerd", code=2)
    assert "did you mean 'engineered'" in done.stderr

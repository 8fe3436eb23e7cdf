"""generate-cfg: what it writes is what was asked, loads back, and is what is published."""

import shlex
import shutil
from pathlib import Path

import pytest

from aixsim_cli.config.pretrain import load_config
from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.transforms.read import read_transform

REPOSITORY = Path(__file__).parents[3]
PUBLISHED = sorted((REPOSITORY / "configs" / "pretrain").glob("*.yaml"))


def test_tutorial_command(aixsim, tmp_path):
    path = tmp_path / "tutorial-60M.yaml"
    done = aixsim(
        "generate-cfg", "--model-flavor", "60M", "--batch-size", 48,
        "--data-parallel-replicate-degree", 2, "--compile", "true",
        "--save-path", path,
    )  # fmt: skip
    assert "63,226,752" in done.stdout and "7,075" in done.stdout and "1,415" in done.stdout
    config = load_config(path)
    assert (config.training.steps, config.lr_scheduler.warmup_steps) == (7075, 1415)
    assert config.compile.enable and config.budget.num_ranks == 2
    assert (config.optimizer.lr, config.debug.seed, config.training.seq_len) == (1e-4, 42, 2048)
    assert config.checkpoint.keep_latest_k == 3 and not config.checkpoint.last_save_model_only
    assert config.transform is None and config.model.converters == []


def test_every_option_arrives(aixsim, tmp_path):
    path, text = tmp_path / "c.yaml", tmp_path / "x.txt"
    text.write_text("Some text.")
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--model-arch", "aixsim", "--tokenizer-path",
        "builtin", "--dataset", "local", "--dataset-path", text, "--batch-size", 3, "--seq-len",
        96, "--gradient-accumulation", 4, "--data-parallel-shard-degree", 2, "--steps", 11,
        "--learning-rate", "2e-3", "--seed", 7, "--mixed-precision-param", "float32",
        "--keep-last-k-ckpts", 0, "--transform-config", "configs/transforms/optical.yaml",
        "--save-path", path,
    )  # fmt: skip
    config = load_config(path)
    training = config.training
    assert (training.dataset, training.dataset_path) == ("local", str(text))
    assert (training.local_batch_size, training.global_batch_size) == (3, 24)
    assert (training.seq_len, training.steps, training.mixed_precision_param) == (96, 11, "float32")
    assert (config.optimizer.lr, config.debug.seed) == (2e-3, 7)
    assert config.checkpoint.keep_latest_k == 0
    assert config.transform == read_transform("configs/transforms/optical.yaml").mapping
    assert config.model.converters == ["aixsim"]


@pytest.mark.parametrize(
    ("words", "compiles", "header"),
    [
        (["--compile"], True, "--compile true"),
        (["--compile=true"], True, "--compile true"),
        (["--compile", "false"], False, ""),
        ([], False, ""),
    ],
)
def test_compile_is_a_flag_that_takes_true_and_false(aixsim, tmp_path, words, compiles, header):
    path, asked = tmp_path / "c.yaml", ("--model-flavor", "debug", "--tokenizer-path", "builtin")
    aixsim("generate-cfg", *asked, *words, "--save-path", path)
    assert load_config(path).compile.enable is compiles
    command = " ".join(("# aixsim generate-cfg", *asked, header)).strip()
    assert path.read_text().splitlines()[1] == command


def test_existing_file_is_kept_without_force(aixsim, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("mine")
    words = ("generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin",
             "--save-path", path)  # fmt: skip
    assert "--force" in aixsim(*words, code=2).stderr
    assert path.read_text() == "mine"
    aixsim(*words, "--force")
    assert load_config(path).model.flavor == "debug"


def test_it_tells_how_to_start_several_ranks(aixsim, tmp_path):
    done = aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin",
        "--data-parallel-replicate-degree", 2, "--save-path", tmp_path / "c.yaml",
    )  # fmt: skip
    assert done.stdout.endswith(f"aixsim pretrain --config {tmp_path}/c.yaml --nproc-per-node 2\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model-flavor", "debug", "--dataset", "local", "--dataset-path", "nothere"],
         "dataset_path nothere: no such file"),
        (["--model-arch", "llama3", "--model-flavor", "debugmodel"],
         "llama3 debugmodel has 2048 words; the tokenizer has"),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse_is_not_written(aixsim, tmp_path, options, said):
    path = tmp_path / "c.yaml"
    words = ("generate-cfg", "--tokenizer-path", "builtin", "--save-path", path, *options)
    assert said in aixsim(*words, code=2).stderr
    assert not path.exists()


def test_dry_run_shows_the_plan_and_writes_nothing(aixsim, tmp_path):
    path = tmp_path / "c.yaml"
    done = aixsim(
        "generate-cfg", "--model-flavor", "60M", "--batch-size", 48, "--transform-config",
        "configs/transforms/optical-fc.yaml", "--save-path", path, "--dry-run",
    )  # fmt: skip
    assert "memory estimate" in done.stdout
    assert "154 modules match" in done.stdout and "digital: 23 modules" in done.stdout
    assert not path.exists()


def test_there_are_published_configs_for_every_flavor():
    from aixsim_cli.config.flavors import FLAVORS

    # debug at other widths is trained by debug's config with another flavor
    flavors = [f for f in FLAVORS["aixsim"] if not f.startswith("debug-")]
    expected = {f"{f}{kind}.yaml" for f in flavors for kind in ("", "-optical")}
    assert {path.name for path in PUBLISHED} == expected


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_config_is_what_its_command_generates(path, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from aixsim_cli.main import app

    monkeypatch.chdir(REPOSITORY)
    command = next(line for line in path.read_text().splitlines() if "aixsim generate-cfg" in line)
    words = shlex.split(command.removeprefix("# aixsim"))
    done = CliRunner().invoke(app, [*words, "--save-path", str(tmp_path / "c.yaml")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "c.yaml").read_text() == path.read_text()


@pytest.mark.parametrize("kind", ["transform", "data", "tokenizer", "a link", "a hard link"])
def test_what_is_read_is_not_written_over(aixsim, tmp_path, kind):
    transform, text = tmp_path / "t.yaml", tmp_path / "data.txt"
    transform.write_text("layer_name_to_config: {default: {q_levels: 16}}\n")
    text.write_text("Some text.")
    words = shutil.copytree(resolve_tokenizer("builtin"), tmp_path / "words")
    target = {"transform": transform, "data": text, "tokenizer": words / "tokenizer.json"}.get(kind)
    if target is None:
        target = tmp_path / "other.yaml"
        target.symlink_to(transform) if kind == "a link" else target.hardlink_to(transform)
    before = target.read_bytes()
    done = aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", words, "--dataset", "local",
        "--dataset-path", text, "--transform-config", transform, "--save-path", target, "--force",
        code=2,
    )  # fmt: skip
    assert f"{target}: is " in done.stderr and "which is read; expected another" in done.stderr
    assert target.read_bytes() == before

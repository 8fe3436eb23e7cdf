"""What a run cannot do is refused before it starts, with the reason and the way out."""

import math
from pathlib import Path

import pytest

from aixsim_cli.config.pretrain import PretrainConfig, build_config, check
from aixsim_cli.errors import ConfigError
from aixsim_cli.settings.document import Document, load_yaml

DEBUG = Path(__file__).parents[3] / "configs" / "pretrain" / "debug-optical.yaml"


def changed(**sections):
    config = load_yaml(DEBUG).data
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return Document(config, "c.yaml")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"parallelism": {"pipeline_parallel_degree": 2}},
            "parallelism.pipeline_parallel_degree: got 2; torchtitan 0.2.2's pipeline gives "
            "gradients of another size, expected 1 (use data_parallel_shard_degree)",
        ),
        (
            {"parallelism": {"context_parallel_degree": 4}},
            "parallelism.context_parallel_degree: got 4; torchtitan 0.2.2's attention over shards "
            "is not tested here, expected 1 (use data_parallel_shard_degree)",
        ),
        (
            {"parallelism": {"tensor_parallel_degree": 2}, "compile": {"enable": True}},
            "compile.enable: got true with tensor_parallel_degree 2; the backward of compiled "
            "blocks over shards fails in torch 2.13, expected false",
        ),
    ],
)
def test_layouts_that_do_not_work(sections, said):
    with pytest.raises(ConfigError) as caught:
        build_config(changed(**sections))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"name": "Adma"}}, "optimizer.name: got 'Adma'; did you mean 'Adam'?"),
        ({"optimizer": {"early_step_in_backward": True}}, "before a gradient that is not finite"),
        ({"model": {"converters": ["float8"]}}, "model.converters: got ['float8']; expected none"),
        ({"quantize": {"linear": {"float8": {"recipe_name": "rowwise"}}}}, "quantize: is not used"),
        ({"fault_tolerance": {"enable": True}}, "fault_tolerance.enable: got true"),
        ({"training": {"enable_cpu_offload": True}}, "training.enable_cpu_offload: got true"),
    ],
)
def test_keys_that_would_do_nothing(sections, said):
    config = load_yaml(DEBUG).data
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    with pytest.raises(ConfigError) as caught:
        build_config(Document(config, "c.yaml"))
    assert said in str(caught.value)


def test_each_of_them_alone_is_taken():
    build_config(changed(parallelism={"tensor_parallel_degree": 2}))
    build_config(changed(compile={"enable": True}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.lr", math.nan, "got .nan; expected a finite number"),
        ("optimizer.lr", math.inf, "got .inf; expected a finite number"),
        ("optimizer.lr", -1e-3, "got -0.001; expected more than 0"),
        ("optimizer.eps", math.nan, "got .nan; expected a finite number"),
        ("optimizer.eps", 0.0, "got 0.0; expected more than 0"),
        ("optimizer.beta1", 1.5, "got 1.5; expected at least 0 and less than 1"),
        ("optimizer.beta2", 1.0, "got 1.0; expected at least 0 and less than 1"),
        ("optimizer.weight_decay", -100.0, "got -100.0; expected 0 or more"),
        ("training.max_norm", math.nan, "got .nan; expected a finite number"),
        ("training.max_norm", 0, "got 0; expected more than 0"),
        ("lr_scheduler.min_lr_factor", math.nan, "got .nan; expected a finite number"),
        ("lr_scheduler.min_lr_factor", 2.0, "got 2.0; expected 0 to 1"),
        ("lr_scheduler.decay_ratio", -0.1, "got -0.1; expected 0 to 1"),
        ("lr_scheduler.total_steps", 0, "got 0; expected 1 to 2,147,483,647"),
        ("training.steps", 2**31, "got 2147483648; expected 1 to 2,147,483,647"),
        ("training.steps", 10**30, "got a whole number of 100 bits; expected at most 63"),
        ("debug.seed", 10**23, "got a whole number of 77 bits; expected at most 63"),
        ("comm.train_timeout_seconds", 0, "got 0; expected more than 0"),
        ("checkpoint.load_step", -2, "got -2; expected -1 (the newest) or a step"),
    ],
)
def test_numbers_that_mean_nothing_here(key, value, said):
    section, name = key.split(".")
    with pytest.raises(ConfigError) as caught:
        build_config(changed(**{section: {name: value}}))
    assert f"{key}: {said}" in str(caught.value)


def test_every_default_is_in_its_range():
    config = PretrainConfig()
    config.model.name, config.model.flavor = "aixsim", "debug"
    config.training.dataset = "builtin"
    assert check(config) == []


def test_ranks_that_share_a_sequence_divide_it():
    odd = {"training": {"seq_len": 63}}
    build_config(changed(**odd))
    with pytest.raises(ConfigError, match="multiple of tensor_parallel_degree \\(2\\)"):
        build_config(changed(**odd, parallelism={"tensor_parallel_degree": 2}))

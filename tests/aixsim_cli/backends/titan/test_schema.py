"""What a run cannot do is refused before it starts, with the reason and the way out."""

from pathlib import Path

import pytest

from aixsim_cli.backends.titan.schema import build_config
from aixsim_cli.config.load import Document, load_yaml
from aixsim_cli.errors import ConfigError

DEBUG = Path(__file__).parents[4] / "configs" / "pretrain" / "debug-optical.yaml"


def changed(**sections):
    config = load_yaml(DEBUG).data
    for section, values in sections.items():
        config[section] = {**config[section], **values}
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

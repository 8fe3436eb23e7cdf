"""The recipe sets keys that the schema has, and is what generate-cfg writes and shows."""

import dataclasses

from aixsim_cli.config.pretrain import PretrainConfig, check
from aixsim_cli.config.recipe import RECIPE, follow


def test_what_help_shows_is_what_a_config_gets():
    config = follow(PretrainConfig())
    for section, keys in vars(RECIPE).items():
        schema = getattr(config, section)
        known = {field.name: getattr(schema, field.name) for field in dataclasses.fields(schema)}
        assert vars(keys).items() <= known.items()


def test_the_recipe_can_be_run():
    config = follow(PretrainConfig())
    config.model.flavor = "debug"
    assert check(config) == []

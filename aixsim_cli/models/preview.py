"""What a transform would do to a model of which no weight is read."""

from typing import Any

from aixsim_cli.config.flavors import find_flavor
from aixsim_cli.models.kind import check_hf_source
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.plan import TransformReport, plan_transform


def of_flavor(transform: TransformConfig, arch: str, flavor: str) -> TransformReport:
    """The report on a torchtitan model.

    Args:
        transform: to put in.
        arch: architecture, "aixsim" or "llama3".
        flavor: within it.

    Raises:
        UserError: there is no such flavor.
        ConfigError: a pattern matches nothing.
    """
    find_flavor(arch, flavor)
    # each library where it is asked for: the other takes seconds to import
    from aixsim_cli.models.titan.model import meta_model, model_args
    from aixsim_cli.models.titan.sites import titan_sites

    # names do not depend on the vocabulary
    return plan_transform(transform, titan_sites(meta_model(model_args(arch, flavor, 1))))


def of_source(
    transform: TransformConfig, source: str, *, trust_remote_code: bool = False
) -> TransformReport:
    """The report on the model of a Hugging Face config, by its class, with random weights.

    Args:
        transform: to put in.
        source: folder or hub name.
        trust_remote_code: run Python code that the model brings.

    Raises:
        UserError: the config cannot be loaded.
        ConfigError: a pattern matches nothing, or names an attention that is out of reach.
    """
    from aixsim_cli.models.hf.simulate import plan

    return plan(meta_model_of(source, trust_remote_code=trust_remote_code), transform)


def meta_model_of(source: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a config, digital and without storage: names and shapes.

    Args:
        source: folder or hub name.
        trust_remote_code: run Python code that the model brings.

    Raises:
        UserError: the config cannot be loaded.
    """
    import torch
    import transformers

    from aixsim_cli.models.hf.saved import load_config

    check_hf_source(source)
    config = load_config(source, trust_remote_code=trust_remote_code)
    # a simulated model's folder says so; the transform at hand is what is asked about
    config.__dict__.pop("quantization_config", None)
    built = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if isinstance(built, type) and issubclass(built, transformers.PreTrainedModel):
            return built(config)
        return transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)

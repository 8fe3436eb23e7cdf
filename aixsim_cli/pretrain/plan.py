"""What a run would do: shown by --dry-run, nothing is started."""

from aixsim_cli.config.budget import TOLERANCE, Plan, make_plan
from aixsim_cli.config.flavors import find_flavor
from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.data.tokenizer import vocab_size
from aixsim_cli.models.preview import of_flavor
from aixsim_cli.models.titan.model import meta_model, model_args

_GIB = 2**30


def describe(config: PretrainConfig, num_ranks: int) -> str:
    """Parameters, tokens, steps and memory of a run, and the modules that the transform touches.

    Args:
        config: checked.
        num_ranks: that it would be started with.

    Raises:
        UserError: the ranks cannot be divided as the config says, or the tokenizer is missing.
        ConfigError: a pattern of the transform matches nothing.
    """
    plan = make_plan(config, num_ranks)
    lines = [str(plan), describe_memory(config, plan.data_ranks)]
    moved = describe_moved_budget(config, plan)
    return "\n".join([*lines, describe_transform(config), *([moved] if moved else [])])


def describe_moved_budget(config: PretrainConfig, plan: Plan) -> str | None:
    """A line for a run whose overrides left the token budget behind; None where they did not."""
    budget = config.budget
    if not budget.tokens:
        return None
    moved = abs(plan.tokens - budget.tokens) > TOLERANCE * budget.tokens
    if not moved and plan.parameters == budget.parameters:
        return None
    return (
        f"note: this trains {plan.parameters:,} parameters on {plan.tokens:,} tokens; the steps "
        f"were worked out for {budget.parameters:,} parameters and {budget.tokens:,} tokens"
    )


def describe_memory(config: PretrainConfig, data_ranks: int) -> str:
    """An estimate of the memory of one rank.

    Weights, gradients and Adam's two moments are 16 bytes a parameter in float32, divided by the
    shard degree. Activations per block and token, in the compute type: 17 values of the model's
    width (34 bytes at 16 bit) with nothing recomputed (Korthikanti et al., arXiv 2205.05198,
    equation 2 without the attention term, which blocked attention does not store), 1 with full
    recomputation, 9 with selective. Logits are kept in the compute type and once in float32.
    """
    size = find_flavor(config.model.name, config.model.flavor)
    args = model_args(
        config.model.name, config.model.flavor, vocab_size(config.model.hf_assets_path)
    )
    parameters = sum(p.numel() for p in meta_model(args).parameters())
    layout, training = config.parallelism, config.training
    other = layout.tensor_parallel_degree
    shard = data_ranks // layout.data_parallel_replicate_degree
    states = 16 * parameters / (shard * other)
    tokens = training.local_batch_size * training.seq_len
    width = 2 if training.mixed_precision_param == "bfloat16" else 4
    per_block = {"none": 17.0, "selective": 9.0, "full": 1.0}
    blocks = per_block.get(config.activation_checkpoint.mode, 17.0) * size.n_layers
    activations = tokens * size.dim * blocks * width
    logits = tokens * args.vocab_size * (width + 4)
    total = states + activations + logits
    return (
        f"memory estimate  {total / _GIB:.2f} GiB a rank: weights, gradients, Adam "
        f"{states / _GIB:.2f}, activations {activations / _GIB:.2f}, logits {logits / _GIB:.2f}"
    )


def describe_transform(config: PretrainConfig) -> str:
    """Which modules the transform would simulate."""
    if config.transform_config is None:
        return "transform        none: digital"
    return str(of_flavor(config.transform_config, config.model.name, config.model.flavor))

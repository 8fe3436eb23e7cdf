"""From parameters to tokens to steps, in whole numbers."""

from dataclasses import dataclass

from torchtitan.config import Parallelism

from aixsim_cli.config.flavors import count_parameters, find_flavor, model_vocab_size
from aixsim_cli.config.pretrain import Budget, PretrainConfig
from aixsim_cli.data.tokenizer import vocab_size
from aixsim_cli.errors import UserError

WARMUP_SHARE = 0.2
# models of this many parameters and more recompute every second block's activations
_RECOMPUTE_FROM = 300_000_000
# how far the ranks at launch may move the token budget
TOLERANCE = 0.01


@dataclass(frozen=True)
class Plan:
    """The numbers behind a config.

    Args:
        parameters: without the input embedding.
        all_parameters: with it.
        tokens: consumed by all steps.
        tokens_per_step: by one.
        steps: of the optimizer.
        warmup_steps: of the learning rate.
        data_ranks: that see different data.
        num_ranks: in all.
    """

    parameters: int
    all_parameters: int
    tokens: int
    tokens_per_step: int
    steps: int
    warmup_steps: int
    data_ranks: int
    num_ranks: int

    def __str__(self) -> str:
        rows = {
            "parameters": f"{self.parameters:,} ({self.all_parameters:,} with the embedding)",
            "ranks": f"{self.num_ranks} ({self.data_ranks} see different data)",
            "tokens per step": f"{self.tokens_per_step:,}",
            "steps": f"{self.steps:,} ({self.warmup_steps:,} warm-up)",
            "tokens": f"{self.tokens:,}",
        }
        return "\n".join(f"{name:<16} {value}" for name, value in rows.items())


def make_plan(config: PretrainConfig, num_ranks: int) -> Plan:
    """What a config comes to, overrides included.

    Raises:
        UserError: the ranks cannot be divided as the config says, the model is unknown, or the
            tokenizer is missing.
    """
    per_step = tokens_per_step(config, num_ranks)
    return Plan(
        parameters=_parameters(config),
        all_parameters=_parameters(config, embedding=True),
        tokens=config.training.steps * per_step,
        tokens_per_step=per_step,
        steps=config.training.steps,
        warmup_steps=config.lr_scheduler.warmup_steps,
        data_ranks=data_ranks(config, num_ranks),
        num_ranks=num_ranks,
    )


def _parameters(config: PretrainConfig, *, embedding: bool = False) -> int:
    arch, flavor = config.model.name, config.model.flavor
    size = find_flavor(arch, flavor)
    rows = model_vocab_size(arch, flavor, vocab_size(config.model.hf_assets_path))
    return count_parameters(size, rows, embedding=embedding)


def fit_to_budget(
    config: PretrainConfig,
    *,
    token_num_scale: float,
    steps: int | None = None,
    gradient_accumulation: int = 1,
    num_gpus: int | None = None,
) -> Plan:
    """Set what follows from the size of a model: batch, steps, warm-up, recomputation; in place.

    Args:
        config: its model, batch a rank, sequence length and parallelism are read.
        token_num_scale: tokens a parameter.
        steps: instead of those that the tokens take.
        gradient_accumulation: batches a step.
        num_gpus: ranks that a shard degree of -1 divides; None = replicas x tensor.

    Returns:
        The plan of the config.

    Raises:
        UserError: unknown model, or ranks that cannot be divided as asked.
    """
    parameters, training = _parameters(config), config.training
    num_ranks = _ranks_of(config, num_gpus)
    ranks = data_ranks(config, num_ranks)
    if gradient_accumulation > 1:
        training.global_batch_size = training.local_batch_size * ranks * gradient_accumulation
    tokens = token_budget(parameters, token_num_scale)
    training.steps = steps or steps_for(tokens, tokens_per_step(config, num_ranks))
    config.lr_scheduler.warmup_steps = warmup_steps(training.steps)
    plan = make_plan(config, num_ranks)
    recomputes = plan.all_parameters >= _RECOMPUTE_FROM
    config.activation_checkpoint.mode = "selective" if recomputes else "none"
    config.budget = Budget(parameters, plan.tokens, num_ranks)
    return plan


def _ranks_of(config: PretrainConfig, num_gpus: int | None) -> int:
    layout = config.parallelism
    least = layout.data_parallel_replicate_degree * _other_degrees(layout)
    if layout.data_parallel_shard_degree == -1:
        return num_gpus or least
    return least * layout.data_parallel_shard_degree


def token_budget(parameters: int, token_num_scale: float) -> int:
    """Tokens to train on: `token_num_scale` a parameter.

    Raises:
        UserError: the scale is no positive number, or would take more tokens than can be counted.
    """
    # NaN fails every comparison
    if not 0 < token_num_scale * parameters < 2**63:
        raise UserError(
            f"token_num_scale: got {token_num_scale}; expected more than 0, and finite tokens"
        )
    return int(parameters * token_num_scale)


def steps_for(tokens: int, per_step: int) -> int:
    """Steps that consume at least `tokens`."""
    return -(-tokens // per_step)


def warmup_steps(steps: int) -> int:
    """Warm-up: a fifth of the steps."""
    return int(WARMUP_SHARE * steps)


def shard_degree(shard: int, *, num_ranks: int, replicate: int, other: int) -> int:
    """The degree of sharding, with -1 meaning all ranks that are left.

    Args:
        shard: as configured.
        num_ranks: in all.
        replicate: data-parallel replicas.
        other: product of the tensor, context and pipeline degrees.

    Raises:
        UserError: the ranks cannot be divided so.
    """
    if shard != -1:
        return shard
    left, rest = divmod(num_ranks, replicate * other)
    if rest or not left:
        raise UserError(
            f"{num_ranks} ranks cannot be divided into {replicate} replicas x {other} (tensor, "
            "context and pipeline parallel); expected a multiple (--num-gpus of "
            "generate-cfg, budget.num_ranks of a config)"
        )
    return left


def data_ranks(config: PretrainConfig, num_ranks: int) -> int:
    """Ranks that see different data, of `num_ranks` in all.

    Raises:
        UserError: the ranks cannot be divided as the config says.
    """
    layout = config.parallelism
    replicate, shard = layout.data_parallel_replicate_degree, layout.data_parallel_shard_degree
    return replicate * shard_degree(
        shard, num_ranks=num_ranks, replicate=replicate, other=_other_degrees(layout)
    )


def tokens_per_step(config: PretrainConfig, num_ranks: int) -> int:
    """Tokens that an optimizer step consumes on `num_ranks` ranks.

    Raises:
        UserError: the ranks cannot be divided as the config says.
    """
    training, ranks = config.training, data_ranks(config, num_ranks)
    if training.global_batch_size > 0:
        return training.global_batch_size * training.seq_len
    return training.local_batch_size * ranks * training.seq_len


def _other_degrees(layout: Parallelism) -> int:
    return (
        layout.tensor_parallel_degree
        * layout.context_parallel_degree
        * layout.pipeline_parallel_degree
    )


def check_ranks(config: PretrainConfig, world_size: int) -> None:
    """Refuse ranks that do not fit a config's parallelism or its token budget.

    Args:
        config: as a run would have it.
        world_size: ranks at launch.

    Raises:
        UserError: with both numbers.
    """
    layout, assumed = config.parallelism, config.budget.num_ranks
    replicate, shard = layout.data_parallel_replicate_degree, layout.data_parallel_shard_degree
    other = _other_degrees(layout)
    if shard != -1 and replicate * shard * other != world_size:
        raise UserError(
            f"{world_size} rank(s) were started; the config's parallelism asks for {replicate} "
            f"(replicate) x {shard} (shard) x {other} (tensor, context, pipeline) = "
            f"{replicate * shard * other}"
        )

    steps = config.training.steps
    actual = steps * tokens_per_step(config, world_size)
    planned = steps * tokens_per_step(config, assumed or world_size)
    if abs(actual - planned) > TOLERANCE * planned:
        raise UserError(
            f"{world_size} rank(s) would train on {actual:,} tokens; the config was made for "
            f"{assumed} rank(s) and {planned:,} tokens. Expected {assumed} rank(s), or "
            f"--budget.num_ranks {world_size} where {actual:,} tokens are meant"
        )

"""From parameters to tokens to steps. Whole numbers only; no torch."""

from dataclasses import dataclass

from aixsim_cli.errors import UserError

WARMUP_SHARE = 0.2
# how far the ranks at launch may move the token budget
TOLERANCE = 0.01


@dataclass
class Budget:
    """What a config's number of steps was computed from.

    Args:
        parameters: of the model, without the input embedding.
        tokens: that the steps consume.
        num_ranks: ranks that the computation assumed; 0 = nothing was assumed.
    """

    parameters: int = 0
    tokens: int = 0
    num_ranks: int = 0


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


def tokens_per_step(batch_size: int, data_ranks: int, accumulation: int, seq_len: int) -> int:
    """Tokens that one optimizer step consumes.

    Args:
        batch_size: sequences a rank and micro-batch.
        data_ranks: ranks that see different data, replicate x shard.
        accumulation: micro-batches a step.
        seq_len: tokens a sequence.
    """
    return batch_size * data_ranks * accumulation * seq_len


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


def data_ranks(config, num_ranks: int) -> int:
    """Ranks of a `PretrainConfig` that see different data, of `num_ranks` in all.

    Raises:
        UserError: the ranks cannot be divided as the config says.
    """
    layout = config.parallelism
    replicate, shard = layout.data_parallel_replicate_degree, layout.data_parallel_shard_degree
    return replicate * shard_degree(
        shard, num_ranks=num_ranks, replicate=replicate, other=_other_degrees(layout)
    )


def config_tokens_per_step(config, num_ranks: int) -> int:
    """Tokens that an optimizer step of a `PretrainConfig` consumes on `num_ranks` ranks.

    Raises:
        UserError: the ranks cannot be divided as the config says.
    """
    training, ranks = config.training, data_ranks(config, num_ranks)
    if training.global_batch_size > 0:
        return training.global_batch_size * training.seq_len
    return tokens_per_step(training.local_batch_size, ranks, 1, training.seq_len)


def _other_degrees(layout) -> int:
    return (
        layout.tensor_parallel_degree
        * layout.context_parallel_degree
        * layout.pipeline_parallel_degree
    )


def check_ranks(config, world_size: int) -> None:
    """Refuse ranks that do not fit a config's parallelism or its token budget.

    Args:
        config: a `PretrainConfig`.
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
    actual = steps * config_tokens_per_step(config, world_size)
    planned = steps * config_tokens_per_step(config, assumed or world_size)
    if abs(actual - planned) > TOLERANCE * planned:
        raise UserError(
            f"{world_size} rank(s) would train on {actual:,} tokens; the config was made for "
            f"{assumed} rank(s) and {planned:,} tokens. Expected {assumed} rank(s), or "
            f"--budget.num_ranks {world_size} where {actual:,} tokens are meant"
        )

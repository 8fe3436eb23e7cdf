"""Tokens, steps and ranks."""

from types import SimpleNamespace

import pytest

from aixsim_cli.config.budget import check_ranks, fit_to_budget, make_plan, shard_degree
from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.config.recipe import follow
from aixsim_cli.errors import UserError


def fitted(*, batch=48, replicate=1, shard=-1, tokenizer=None, flavor="60M", scale=22.0, **asked):
    config = follow(PretrainConfig())
    config.model.flavor = flavor
    config.model.hf_assets_path = tokenizer or config.model.hf_assets_path
    config.training.local_batch_size = batch
    config.parallelism.data_parallel_replicate_degree = replicate
    config.parallelism.data_parallel_shard_degree = shard
    return config, fit_to_budget(config, token_num_scale=scale, **asked)


def test_published_numbers_of_60m():
    config, plan = fitted(shard=2)
    assert (plan.parameters, plan.steps, plan.warmup_steps) == (63_226_752, 7075, 1415)
    assert plan.tokens_per_step == 48 * 2 * 2048 and plan.num_ranks == 2
    assert (config.training.steps, config.lr_scheduler.warmup_steps) == (7075, 1415)
    assert config.budget.tokens == plan.tokens and config.activation_checkpoint.mode == "none"
    assert make_plan(config, 2) == plan


def test_all_ranks_left_come_from_num_gpus():
    assert fitted(num_gpus=2)[1].steps == 7075
    assert fitted()[1].steps == 14150
    assert fitted(replicate=2)[1].steps == 7075
    assert fitted(num_gpus=4, replicate=2)[1].data_ranks == 4


def test_accumulation_counts_as_batch():
    _, wide = fitted()
    config, deep = fitted(batch=12, gradient_accumulation=4)
    assert wide.steps == deep.steps and config.training.global_batch_size == 48


def test_ranks_that_do_not_divide():
    with pytest.raises(UserError, match="3 ranks cannot be divided into 2 replicas"):
        shard_degree(-1, num_ranks=3, replicate=2, other=1)


def config(*, shard=-1, replicate=1, assumed=2, global_batch_size=-1):
    return SimpleNamespace(
        parallelism=SimpleNamespace(
            data_parallel_replicate_degree=replicate,
            data_parallel_shard_degree=shard,
            tensor_parallel_degree=1,
            context_parallel_degree=1,
            pipeline_parallel_degree=1,
        ),
        training=SimpleNamespace(
            steps=100, local_batch_size=2, global_batch_size=global_batch_size, seq_len=8
        ),
        budget=SimpleNamespace(num_ranks=assumed),
    )


def test_other_ranks_than_assumed_are_refused_with_both_numbers():
    check_ranks(config(), 2)
    with pytest.raises(UserError, match=r"4 rank\(s\) would train on 6,400 tokens.*2.*3,200"):
        check_ranks(config(), 4)


def test_a_fixed_global_batch_keeps_the_budget():
    check_ranks(config(global_batch_size=8), 4)


def test_ranks_that_do_not_fit_the_parallelism():
    with pytest.raises(UserError, match=r"3 rank\(s\) were started.*1 \(replicate\) x 2 \(shard\)"):
        check_ranks(config(shard=2), 3)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0, -1, 1e30])
def test_a_token_scale_that_is_no_number_of_tokens_is_refused(scale):
    with pytest.raises(UserError, match=r"token_num_scale: got .*; expected more than 0"):
        fitted(flavor="debug", tokenizer="builtin", scale=scale)

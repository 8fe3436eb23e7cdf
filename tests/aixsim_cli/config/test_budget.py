"""Tokens, steps and ranks."""

from types import SimpleNamespace

import pytest

from aixsim_cli.config.budget import check_ranks, shard_degree
from aixsim_cli.config.generate import Request, make_plan
from aixsim_cli.errors import UserError


def test_published_numbers_of_60m():
    plan = make_plan(Request(model_flavor="60M", batch_size=48, data_parallel_shard_degree=2))
    assert (plan.parameters, plan.steps, plan.warmup_steps) == (63_226_752, 7075, 1415)
    assert plan.tokens_per_step == 48 * 2 * 2048 and plan.num_ranks == 2


def test_all_ranks_left_come_from_num_gpus():
    request = {"model_flavor": "60M", "batch_size": 48}
    assert make_plan(Request(**request, num_gpus=2)).steps == 7075
    assert make_plan(Request(**request)).steps == 14150
    assert make_plan(Request(**request, data_parallel_replicate_degree=2)).steps == 7075
    both = Request(**request, num_gpus=4, data_parallel_replicate_degree=2)
    assert make_plan(both).data_ranks == 4


def test_accumulation_counts_as_batch():
    wide = make_plan(Request(model_flavor="60M", batch_size=48))
    deep = make_plan(Request(model_flavor="60M", batch_size=12, gradient_accumulation=4))
    assert wide.steps == deep.steps


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
        make_plan(Request(model_flavor="debug", tokenizer_path="builtin", token_num_scale=scale))

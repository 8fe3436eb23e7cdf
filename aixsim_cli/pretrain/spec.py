"""What torchtitan trains: the `aixsim` architecture's flavors, and torchtitan's own `llama3`."""

import copy
import dataclasses
from typing import Any

from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import get_train_spec as get_llama3_spec
from torchtitan.models.llama3.infra.parallelize import parallelize_llama
from torchtitan.protocols.train_spec import TrainSpec

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.data.tokenizer import load_tokenizer, resolve_tokenizer
from aixsim_cli.models.titan.model import model_args
from aixsim_cli.models.titan.sites import StateDictAdapter
from aixsim_cli.pretrain import compat
from aixsim_cli.pretrain.dataloader import build_dataloader
from aixsim_cli.pretrain.metrics import build_metrics_processor
from aixsim_cli.pretrain.optimizers import build_optimizers
from aixsim_cli.pretrain.tensor_parallel import compute_whole


def build_train_spec(config: PretrainConfig) -> TrainSpec:
    """torchtitan's Llama spec with our model arguments, data, tokenizer, metrics and patches.

    Raises:
        UserError: unknown tokenizer, or one that does not fit the model.
    """
    # transformers', which evaluates and continues what is trained here
    tokenizer = load_tokenizer(resolve_tokenizer(config.model.hf_assets_path))
    args = model_args(config.model.name, config.model.flavor, len(tokenizer))
    return dataclasses.replace(
        get_llama3_spec(),
        model_args={config.model.flavor: args},
        parallelize_fn=_parallelize,
        build_optimizers_fn=build_optimizers,
        build_tokenizer_fn=lambda job_config: tokenizer,
        build_dataloader_fn=build_dataloader_for,
        build_metrics_processor_fn=build_metrics_processor,
        build_validator_fn=None,
        state_dict_adapter=StateDictAdapter,
    )


def build_dataloader_for(
    *, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: PretrainConfig
):
    """The training data of a config, this rank's share of it."""
    training = job_config.training
    return build_dataloader(
        dataset=training.dataset,
        dataset_path=training.dataset_path,
        split="train",
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        batch_size=training.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        infinite=True,
        retries=job_config.reliability.data_retries,
        **dataclasses.asdict(training.dataloader),
    )


def _parallelize(
    model: nn.Module, parallel_dims: ParallelDims, job_config: PretrainConfig
) -> nn.Module:
    whole = copy.deepcopy(model)
    model = parallelize_llama(model, parallel_dims, job_config)
    compat.init_as_one_rank_on_cpu(model, whole)
    compat.sum_gradients_over_replicas(model)
    compat.reduce_by_sum_on_gloo(model)
    if parallel_dims.tp_enabled:
        compute_whole(model, parallel_dims.get_mesh("tp"))
    return model

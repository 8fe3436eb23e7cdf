"""Every mend of torchtitan 0.2.2, in one place.

Each function says what is wrong in that version. `test_train.py` and `test_agreement.py` fail
without it. `install` refuses any other version.
"""

import contextlib
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.distributed.utils as dist_utils
import torchtitan.tools.utils as titan_utils
import torchtitan.train
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra import parallelize

from aixsim_cli.errors import UserError
from aixsim_cli.run import device

TORCHTITAN_VERSION = "0.2.2"


@cache
def install() -> None:
    """Apply all mends that are global. Idempotent.

    Raises:
        UserError: another version of torchtitan is installed.
    """
    found = version("torchtitan")
    if found != TORCHTITAN_VERSION:
        raise UserError(f"torchtitan: found {found}; expected {TORCHTITAN_VERSION}")
    forget_launcher_settings()
    save_simulated_ops()
    skip_autocast_to_float32()
    take_odd_lengths()
    if device.device_type() == "cpu":
        # the table of peak FLOPS runs lspci and warns for each CPU; utilisation means nothing here
        titan_utils.get_peak_flops = lambda device_name: float("inf")


def forget_launcher_settings() -> None:
    """torchtitan sets these variables whatever they are, and warns of what torchrun had set."""
    for name in (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "TORCH_FR_BUFFER_SIZE",
        "TORCH_FR_DUMP_TEMP_FILE",
    ):
        os.environ.pop(name, None)


def save_simulated_ops() -> None:
    """Selective "op" checkpointing recomputes whatever is not on its list: put our ops there."""
    import aixsim_kernels  # noqa: F401  (registers torch.ops.aixsim)

    for name in ("optical_linear", "optical_attention"):
        parallelize._op_sac_save_list.add(getattr(torch.ops.aixsim, name).default)


def skip_autocast_to_float32() -> None:
    """Asked for float32, torchtitan enters an autocast that torch refuses with a warning."""
    original = dist_utils.maybe_enable_amp

    def maybe_enable_amp(parallel_dims, mixed_precision_param: str, device_type: str):
        if mixed_precision_param == "float32":
            return contextlib.nullcontext()
        return original(parallel_dims, mixed_precision_param, device_type)

    torchtitan.train.dist_utils.maybe_enable_amp = maybe_enable_amp


def take_odd_lengths() -> None:
    """torchtitan asks for an even sequence length, for the sake of a context parallelism of 1."""

    def seq_len_divisor(dims: ParallelDims) -> int:
        return dims.tp * (2 * dims.cp if dims.cp_enabled else 1)

    ParallelDims.seq_len_divisor = property(seq_len_divisor)  # pyright: ignore[reportAttributeAccessIssue]


def sum_gradients_over_replicas(model: nn.Module) -> None:
    """Make DDP add gradients up instead of averaging them.

    torchtitan divides the loss by the global number of tokens, so gradients must be summed over
    ranks; its FSDP path switches the division off, its DDP path does not, and its gradients come
    out divided by the number of replicas (torchtitan issue 2318).

    Args:
        model: after `parallelize_llama`; unchanged unless it was replicated.
    """
    if not hasattr(model, "register_comm_hook"):
        return

    def all_reduce_sum(group: dist.ProcessGroup | None, bucket: dist.GradBucket):
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    # the mesh of a replicated model is the whole world: torchtitan refuses DDP with anything else
    register: Callable = model.register_comm_hook  # pyright: ignore[reportAssignmentType]
    register(None, all_reduce_sum)


def reduce_by_sum_on_gloo(model: nn.Module) -> None:
    """FSDP asks for PREMUL_SUM, which gloo lacks; ask it for plain sums."""
    if dist.get_backend() != "gloo":
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def init_as_one_rank(model: Any, whole: Any) -> None:
    """Draw the initial weights of a sharded model as one rank would.

    DTensor draws random numbers for a shard as a part of the whole on accelerators alone. On a CPU
    every rank fills its shard from the same seed, and all shards come out equal.

    Args:
        model: after `parallelize_llama`; unchanged unless its weights are sharded on a CPU.
        whole: a copy of the model from before, on the meta device.
    """
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    if not meshes or meshes[0].device_type != "cpu":
        return
    init_shards = model.init_weights

    def init_weights(*args: Any, **kwargs: Any) -> None:
        whole.to_empty(device="cpu")
        type(whole).init_weights(whole)
        state = torch.get_rng_state()
        init_shards(*args, **kwargs)  # what is not sharded, and the buffers
        torch.set_rng_state(state)
        for ours, full in zip(model.parameters(), whole.parameters(), strict=True):
            ours.copy_(_like(full.detach(), ours) if isinstance(ours, DTensor) else full)
        whole.to("meta")

    model.init_weights = init_weights


def _like(full: Tensor, sharded: DTensor) -> DTensor:
    mesh = sharded.device_mesh
    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=sharded.placements)


def watch_gradient_norm(callback: Callable[[Tensor], None]) -> None:
    """Call back with every gradient norm, before the optimizer's step.

    torchtitan computes the norm inside `train_step` and shows it to nobody before the weights
    have been changed by it. The callback may raise to stop the step.

    Args:
        callback: takes the norm, a scalar tensor.
    """
    original = dist_utils.clip_grad_norm_

    def clip_grad_norm_(*args, **kwargs) -> Tensor:
        norm = original(*args, **kwargs)
        callback(norm)
        return norm

    torchtitan.train.dist_utils.clip_grad_norm_ = clip_grad_norm_

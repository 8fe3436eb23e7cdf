"""Every patch of torchtitan 0.2.2 but that of `run/device.py`, which is made during its import.

Of each: what breaks without it, where that is known upstream, the test that fails without it, and
when it can go. `install` refuses any other version. What merely warns is no patch: `NOISE`, and the
filter of `run/log.py`.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra import parallelize

from aixsim_cli.errors import UserError
from aixsim_cli.transforms.state import TransformState

TORCHTITAN_VERSION = "0.2.2"
# what torchtitan warns of where nothing is wrong
NOISE = (
    # it sets some variables whatever they are, and torchrun has set them before
    "will be overridden to",
    # its table of peak FLOPS knows no CPU
    "Error running lspci",
    "Peak flops undefined for",
)


@cache
def install(manager: type[CheckpointManager]) -> None:
    """Apply all patches that are global. Idempotent.

    Args:
        manager: as of `use_checkpoints`.

    Raises:
        UserError: another version of torchtitan is installed.
    """
    found = version("torchtitan")
    if found != TORCHTITAN_VERSION:
        raise UserError(f"torchtitan: found {found}; expected {TORCHTITAN_VERSION}")
    use_checkpoints(manager)
    save_simulated_ops()
    take_odd_lengths()


def use_checkpoints(manager: type[CheckpointManager]) -> None:
    """Have the Trainer build our checkpoint manager.

    Breaks: checkpoints have no config and no manifest, and a torn one is loaded.
    Upstream: none known; a TrainSpec has builders for all its parts but this one.
    Test: tests/faults/test_nonfinite.py::test_what_the_policy_says
    Remove when: a TrainSpec can name a checkpoint manager.

    Args:
        manager: its class.
    """
    torchtitan.train.CheckpointManager = manager


def save_simulated_ops() -> None:
    """Put our ops on the list of what selective "op" checkpointing saves.

    Breaks: every simulated product is computed twice a step; losses are equal.
    Upstream: none known; the list is a private one of each model.
    Test: tests/aixsim_cli/pretrain/test_compat.py::test_selective_recomputation_saves_simulated_ops
    Remove when: a model's list can be given, or added to.
    """
    import aixsim_kernels  # noqa: F401  (registers torch.ops.aixsim)

    for name in ("optical_linear", "optical_attention"):
        parallelize._op_sac_save_list.add(getattr(torch.ops.aixsim, name).default)


def take_odd_lengths() -> None:
    """Ask for an even sequence length only where there is context parallelism.

    Breaks: a run with an odd `training.seq_len` is refused, for a context parallelism of 1.
    Upstream: none known.
    Test: tests/faults/test_places.py::test_an_odd_length_trains
    Remove when: `ParallelDims.seq_len_divisor` looks at `cp_enabled`.
    """

    def seq_len_divisor(dims: ParallelDims) -> int:
        return dims.tp * (2 * dims.cp if dims.cp_enabled else 1)

    ParallelDims.seq_len_divisor = property(seq_len_divisor)  # pyright: ignore[reportAttributeAccessIssue]


def sum_gradients_over_replicas(model: nn.Module) -> None:
    """Make DDP add gradients up instead of averaging them.

    torchtitan divides the loss by the global number of tokens, so gradients must be summed over
    ranks; its FSDP path switches the division off, its DDP path does not.

    Breaks: gradients of replicas are divided by their number.
    Upstream: https://github.com/pytorch/torchtitan/issues/2318 and, closed without a merge,
        https://github.com/pytorch/torchtitan/pull/2323
    Test: tests/distributed/test_agreement.py::test_loss_and_gradient_norm
    Remove when: the gradient norm of two replicas is that of one rank.

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
    """Have FSDP ask gloo for plain sums.

    Breaks: FSDP asks for PREMUL_SUM, which gloo lacks; shards do not train on a CPU.
    Upstream: https://github.com/pytorch/torchtitan/pull/2332, the same on Intel's GPUs.
    Test: tests/distributed/test_agreement.py::test_loss_and_gradient_norm
    Remove when: torchtitan asks for sums where the backend has nothing else.

    Args:
        model: after `parallelize_llama`; unchanged unless it was sharded.
    """
    if dist.get_backend() != "gloo":
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def init_as_one_rank_on_cpu(model: Any, whole: Any) -> None:
    """Draw the initial weights of a sharded model as one rank would.

    DTensor draws random numbers for a shard as a part of the whole on accelerators alone.

    Breaks: on a CPU every rank fills its shard from the same seed, and all shards come out equal.
    Upstream: none known.
    Test: tests/aixsim_cli/pretrain/test_compat.py::test_shards_begin_as_one_rank_does
    Remove when: DTensor's random numbers are those of one rank on a CPU too.

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


def reset_after_init(model: Any, state: TransformState) -> None:
    """Set the state of simulated modules up where the weights are.

    `to_empty` leaves garbage in buffers, and the model's `init_weights` knows none of ours.

    Breaks: ranges begin as whatever the memory held.
    Upstream: none known; a model converter has no hook after the weights are drawn.
    Test: tests/aixsim_cli/pretrain/test_compat.py::test_ranges_begin_unset
    Remove when: converters have that hook.

    Args:
        model: torchtitan's, on the meta device.
        state: of its transform.
    """
    init_weights = model.init_weights

    def init_weights_and_state(*args: Any, **kwargs: Any) -> None:
        init_weights(*args, **kwargs)
        state.reset()

    model.init_weights = init_weights_and_state

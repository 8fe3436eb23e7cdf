"""Tensor parallelism of a simulated model: the shards of one device, never a device a shard.

A shard of a layer has ranges of its own, and a detector that reads partial sums: other hardware
than the one that the config describes. So a simulated module is computed whole, by every rank of
the tensor-parallel group: weights, optimizer states, norms, embedding and output stay sharded, and
losses, ranges and noise are those of one rank. What it costs: the simulated products are computed
by each rank of the group, and their operands are gathered.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from aixsim_cli.transforms.state import SimulatedModule

_HEADS = Shard(1)


def compute_whole(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every simulated module of a sharded model compute on whole tensors, in place.

    Args:
        model: after torchtitan's tensor parallelism.
        mesh: of the tensor-parallel group.
    """
    for module in model.modules():
        if not isinstance(module, SimulatedModule):
            continue
        for owner in module.modules():
            # every rank has the whole of it; torch wraps the buffers of what it shards
            for name, buffer in owner.named_buffers(recurse=False):
                owner._buffers[name] = buffer.to_local() if isinstance(buffer, DTensor) else buffer
        simulated: Any = module
        if isinstance(module, nn.Linear):
            simulated.forward = partial(_linear, module, module.forward)
        else:
            simulated.forward = partial(_attention, mesh, module.forward)


def _linear(module: nn.Linear, forward: Callable[..., Tensor], input: DTensor) -> DTensor:
    """torchtitan's hooks shard the input before, and the output after."""
    with _whole_parameters(module):
        output = forward(input.full_tensor())
    return DTensor.from_local(output, input.device_mesh, [Replicate()], run_check=False)


def _attention(
    mesh: DeviceMesh, forward: Callable[..., Tensor], *heads: Tensor, **options: Any
) -> Tensor:
    """Query, key and value (B, heads of this rank, L, D); torchtitan shards an attention so."""
    whole = (DTensor.from_local(t, mesh, [_HEADS], run_check=False).full_tensor() for t in heads)
    output = DTensor.from_local(forward(*whole, **options), mesh, [Replicate()], run_check=False)
    return output.redistribute(placements=[_HEADS]).to_local()


@contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block the module's attributes are its gathered parameters."""
    names = [name for name, value in module.named_parameters() if isinstance(value, DTensor)]
    # an attribute of the instance goes before the module's own parameter of that name
    module.__dict__.update({name: getattr(module, name).full_tensor() for name in names})
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]

"""The device at hand, and torchtitan made to run on it, CPU included."""

import types

import torch
import torch._utils as torch_utils


def device_type() -> str:
    """The device that a run would use: an accelerator's type (`cuda`, `xpu`, …) or `cpu`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def prepare(logging: types.ModuleType) -> None:
    """Let torchtitan see this machine's device.

    torchtitan 0.2.2 looks for its device while `torchtitan.tools.utils` is being imported, and
    falls back to "cuda" where there is no accelerator. On such a machine this names "cpu" as the
    device and gives `torch.cpu` the few functions that torchtitan asks of a device module.
    Nothing is changed where an accelerator is present. So this patch alone is made while
    torchtitan is being imported; all others are in `pretrain/compat.py`.

    Breaks: on a CPU nothing trains, torchtitan calls torch.cuda.
    Upstream: none known.
    Test: tests/aixsim_cli/run/test_device.py::test_torchtitan_sees_it_whatever_is_imported_first
    Remove when: torchtitan asks for a device where it uses one, and takes a CPU.

    Args:
        logging: the module `torchtitan.tools.logging`, which torchtitan imports before all that
            asks for a device. Its package has no file of its own that a hook could follow.
    """
    if device_type() == "cpu":
        torch_utils._get_available_device_type = lambda: "cpu"
        for name, function in _CPU_FUNCTIONS.items():
            setattr(torch.cpu, name, function)


def _total_memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_CPU_FUNCTIONS = {
    "get_device_name": lambda device=None: "cpu",
    "get_device_properties": lambda device=None: types.SimpleNamespace(
        total_memory=_total_memory()
    ),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    # torch.cpu answers "cpu" here, and torchtitan passes the answer to barrier(device_ids=[…])
    "current_device": lambda: 0,
}

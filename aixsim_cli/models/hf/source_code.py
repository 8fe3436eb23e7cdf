"""What the code of a model's classes tells about what can be simulated there.

Nothing here knows an architecture: classes are told by what they do.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from aixsim_cli.models.hf.attention import ATTENTION_NAME, HARMLESS, HONOURED, MASKED_BY_MODEL

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# what may be asked of a weight that is multiplied in its linear's forward
_ASKED = {"dtype", "shape", "device", "ndim", "requires_grad", "is_quantized", "data"}


def is_attention(kind: type[nn.Module]) -> bool:
    """Whether its forward calls transformers' attention interface."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and _INTERFACE in code.co_names


def has_own_sdpa(kind: type[nn.Module]) -> bool:
    """Whether its file keeps an sdpa of its own, which registering another one does not reach."""
    functions = inspect.unwrap(kind.forward).__globals__.get(_INTERFACE)
    return ATTENTION_NAME in getattr(functions, "_local_mapping", ())


@cache
def unknown_terms(kind: type[nn.Module]) -> frozenset[str]:
    """Keywords by which an attention's forward hands over what the simulation would ignore."""
    tree = _tree(kind.forward)
    if tree is None or not is_attention(kind):
        # no source: the first call is checked all the same
        return frozenset()
    nodes = list(ast.walk(tree))
    interfaces = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if _INTERFACE in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    given = {
        keyword.arg
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) in interfaces
        for keyword in node.keywords
        if keyword.arg is not None
    }
    return frozenset(given - HONOURED - MASKED_BY_MODEL - HARMLESS)


@cache
def is_product(kind: type[nn.Module]) -> bool:
    """Whether a linear's forward is `input @ weight.T + bias`: a subclass may do something else."""
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    # by way of meta: initial weights are drawn from the user's random numbers
    plain = nn.Linear(3, 2, device="meta").to_empty(device="cpu").requires_grad_(False)
    x = torch.arange(24.0, device="cpu").view(2, 4, 3)
    for parameter in plain.parameters():
        parameter.copy_(torch.arange(1.0, parameter.numel() + 1, device="cpu").view_as(parameter))
    try:
        return torch.allclose(kind.forward(plain, x), plain(x))
    except Exception:
        # it needs more than a weight and a bias
        return False


@cache
def multiplied_by(owner: type[nn.Module]) -> dict[str, bool]:
    """Submodules whose weight a class multiplies itself, past their forward.

    Fused kernels do so, and `nn.MultiheadAttention`: replacing the linear would not be noticed.

    Returns:
        name of the submodule -> whether the class also calls it, in another branch.
    """
    functions = [
        function
        for kind in owner.__mro__[: owner.__mro__.index(nn.Module)]
        for name, function in vars(kind).items()
        if name != "__init__" and _names(function)
    ]
    read = {c for f in functions if "weight" in _names(f) for c in _weights_read(f)}
    return {
        child: any(child in _names(f) and child in _called(f) for f in functions) for child in read
    }


def _called(function: Callable[..., Any]) -> set[str]:
    nodes = ast.walk(_tree(function) or ast.Module([], []))
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    return {call.removeprefix("self.") for call in calls if call.startswith("self.")}


def _weights_read(function: Callable[..., Any]) -> set[str]:
    """`child` of every `self.child.weight` that is more than asked for its type or shape."""
    tree = _tree(function)
    if tree is None:
        return set()
    nodes = list(ast.walk(tree))
    asked = {
        id(node.value)
        for node in nodes
        if isinstance(node, ast.Attribute) and (node.attr in _ASKED or node.attr[0] == "_")
    }
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "getattr"}:
            asked |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Assign):
            asked |= {id(target) for target in node.targets}
    return {
        node.value.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked
        if isinstance(node.value, ast.Attribute) and ast.unparse(node.value.value) == "self"
    }


def _names(function: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return () if code is None else code.co_names


def _tree(function: Callable[..., Any]) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None

"""How kernels are written: launches by keyword, a shape at every load, dot and store."""

import ast
import re
from pathlib import Path

import aixsim_kernels
import pytest

PACKAGE = Path(aixsim_kernels.__file__).parent
TRITON = sorted(PACKAGE.rglob("*triton*.py"))
# a shape: "# [BLOCK_M, BLOCK_N]", "# [] of a number"
SHAPE = re.compile(r"# .*\[[\w, /]*\]")
MOVES = {"tl.load", "tl.store", "tl.dot"}


def ids(path):
    return str(path.relative_to(PACKAGE))


def in_triton(source):
    """Calls inside of Triton functions."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and "triton.jit" in "".join(
            map(ast.unparse, node.decorator_list)
        ):
            yield from (call for call in ast.walk(node) if isinstance(call, ast.Call))


def without_a_shape(source):
    """Lines that load, multiply or store, and do not say which shape."""
    lines = source.splitlines()
    moves = {call.lineno for call in in_triton(source) if ast.unparse(call.func) in MOVES}
    # beside it, or above it
    told = {n for n in moves if SHAPE.search(lines[n - 1]) or SHAPE.match(lines[n - 2].strip())}
    return sorted(moves - told)


def launched(source):
    """Lines that launch a kernel past `launch`, and that give it an argument without a name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    past = [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]
    launches = [call for call in calls if ast.unparse(call.func) == "launch"]
    # the kernel, and how many programs
    return past, [call.lineno for call in launches if len(call.args) != 2]


def unguarded(source):
    """Lines that call a Triton side elsewhere than on the device of a tensor.

    Triton launches on the current device, which a model that is spread over several is not on.
    """
    nodes = list(ast.walk(ast.parse(source)))
    guards = [
        n for n in nodes if isinstance(n, ast.With) and "device_of" in ast.unparse(n.items[-1])
    ]
    guarded = {id(inner) for guard in guards for inner in ast.walk(guard)}
    returns = [n for n in nodes if isinstance(n, ast.Return) and "triton." in ast.unparse(n)]
    return [n.lineno for n in returns if id(n) not in guarded]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("op.py")), ids=ids)
def test_kernels_are_launched_on_the_tensors_device(path):
    source = path.read_text(encoding="utf-8")
    assert "triton." in source and unguarded(source) == []


@pytest.mark.parametrize("path", TRITON, ids=ids)
def test_what_moves_says_its_shape(path):
    assert without_a_shape(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", TRITON, ids=ids)
def test_kernels_are_launched_in_one_place_and_by_keyword(path):
    past, by_position = launched(path.read_text(encoding="utf-8"))
    assert len(past) == (path.stem == "triton_launch") and not by_position


def test_what_these_look_for_is_found():
    source = """
@triton.jit
def kernel(x_ptr):
    a = tl.load(x_ptr)  # [BLOCK]
    # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    acc = tl.dot(a, b)
    tl.store(x_ptr, acc)  # a tile
    tl.store(x_ptr, acc, 2)

def forward(x):
    launch(kernel, 1, x_ptr=x)
    launch(kernel, 1, x)
    kernel[(2,)](x_ptr=x)
"""
    assert without_a_shape(source) == [7, 8]
    assert launched(source) == ([13], [12])


def test_the_definition_can_be_read_in_one_sitting():
    lines = (PACKAGE / "optical" / "definition.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150

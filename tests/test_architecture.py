"""The shape of the code: imports run one way, files and functions stay small, nothing unsafe."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FILES = sorted(
    path for top in ("aixsim_cli", "kernels") for path in (REPOSITORY / top).rglob("*.py")
)
# who may import whom: a part imports itself, and the floors below its own
FLOORS = [
    {"__main__"},
    {"main"},
    {"commands"},
    {"options", "pretrain", "continual", "eval"},
    {"energy"},
    {"models"},
    {"config"},
    {"transforms"},
    {"data"},
    {"run", "settings"},
    {"files"},
    {"errors"},
]
LIGHT = ("main.py", "options.py", "errors.py", "__init__.py", "__main__.py", "config/flavors.py")
HEAVY = {"torch", "torchtitan", "transformers", "datasets", "wandb", "triton", "accelerate"}


def part(path):
    inside = path.relative_to(REPOSITORY / "aixsim_cli").parts
    return inside[0].removesuffix(".py")


def imports(tree, *, top_level=False):
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; expected the full name"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def ids(path):
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_size(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            decorators = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
            limit = 120 if "triton.jit" in decorators or part_of_commands(path) else 60
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= limit, f"{node.name}: {length} lines"


def part_of_commands(path):
    # a command is its list of options and one call
    return "commands" in path.parts


@pytest.mark.parametrize("path", [p for p in FILES if "kernels" in p.parts[-4:]], ids=ids)
def test_kernels_know_no_models(path):
    names = {name.split(".")[0] for name in imports(parsed(path))}
    assert not names & {"aixsim_cli", "torchtitan", "transformers", "datasets"}


def modules(*packages):
    """Dotted name -> file, of these packages."""
    folders = {"aixsim_cli": REPOSITORY, "aixsim_kernels": REPOSITORY / "kernels"}
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for name, folder in folders.items()
        for path in FILES
        if name in (packages or folders) and path.is_relative_to(folder / name)
    }


def imported_modules(path, known):
    """Of these modules those that a file imports, anywhere in it."""
    used = {name for name in imports(parsed(path)) if name in known and known[name] != path}
    return used - {"aixsim_cli", "aixsim_kernels"}


def test_every_part_has_its_floor():
    parts = {part(path) for path in modules("aixsim_cli").values()} - {"__init__"}
    assert parts == set().union(*FLOORS)


def test_the_picture_in_contributing_is_the_law():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = [set(line.split()) for line in text.split("```")[1].split("\n") if line.strip()]
    above = {"__main__", "main", "options"}
    assert drawn == [parts - above for parts in FLOORS if parts - above]


@pytest.mark.parametrize("path", modules("aixsim_cli").values(), ids=ids)
def test_imports_run_one_way(path):
    here = part(path)
    if here == "__init__":
        return
    floor = next(i for i, parts in enumerate(FLOORS) if here in parts)
    allowed = {here}.union(*FLOORS[floor + 1 :])
    used = {name.split(".")[1] for name in imported_modules(path, modules("aixsim_cli"))}
    assert used <= allowed, f"imports {used - allowed}"
    assert "options" not in used or here == "commands"


def test_no_circle_of_imports():
    # also of imports inside functions, which only hide one
    known = modules()
    below = {name: imported_modules(path, known) for name, path in known.items()}
    while leaves := [name for name, used in below.items() if not used & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"a circle within: {sorted(below)}"


@pytest.mark.parametrize("path", [p for p in FILES if "models" in p.parts], ids=ids)
def test_libraries_of_models_do_not_meet(path):
    names = {name.split(".")[0] for name in imports(parsed(path))}
    if "hf" in path.parts:
        assert "torchtitan" not in names
    if "titan" in path.parts:
        assert "transformers" not in names


@pytest.mark.parametrize("path", [p for p in FILES if "data" in p.parts], ids=ids)
def test_data_knows_no_trainer(path):
    names = {name.split(".")[0] for name in imports(parsed(path))}
    assert "torchtitan" not in names


@pytest.mark.parametrize("path", [p for p in FILES if "transforms" in p.parts], ids=ids)
def test_transforms_know_no_library_of_models(path):
    names = {name.split(".")[0] for name in imports(parsed(path))}
    assert not names & {"torchtitan", "transformers", "datasets"}


@pytest.mark.parametrize(
    "path", [p for p in FILES if str(p).endswith(LIGHT) or "commands" in p.parts], ids=ids
)
def test_light_files_import_nothing_heavy_at_the_top(path):
    names = {name.split(".")[0] for name in imports(parsed(path), top_level=True)}
    assert not names & HEAVY


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_unsafe(path):
    text = path.read_text(encoding="utf-8")
    for unsafe in ("trust_remote_code=True", "yaml.load(", "yaml.unsafe", "eval(input"):
        assert unsafe not in text
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" for k in node.keywords)


# the doors through which strangers' models and tokenizers come
DOORS = {"aixsim_cli/data/tokenizer.py", "aixsim_cli/models/hf/saved.py"}
# builds what a config says, of the installed code or of what came with it
BUILDERS = {"aixsim_cli/continual/train.py", "aixsim_cli/models/preview.py"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_whether_code_of_strangers_runs_is_said_in_every_call(path):
    # without a word transformers asks, and takes what stdin says for an answer
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in ("from_pretrained", "from_config"):
            assert any(k.arg == "trust_remote_code" for k in node.keywords), f"line {node.lineno}"
            allowed = DOORS if node.func.attr == "from_pretrained" else BUILDERS
            assert ids(path) in allowed, f"line {node.lineno}: goes past the one door"


@pytest.mark.parametrize(
    "path", [p for p in FILES if "transforms" in p.parts or "kernels" in p.parts[-4:]], ids=ids
)
def test_no_host_reads_and_no_prints_where_models_run(path):
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    for call in calls:
        if isinstance(call.func, ast.Attribute):
            assert call.func.attr != "item", f"line {call.lineno}: .item()"
        if isinstance(call.func, ast.Name):
            assert call.func.id != "print", f"line {call.lineno}: print"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name not in ("main.py", "__main__.py")], ids=ids
)
def test_processes_end_in_main_alone(path):
    # what raises says what happened; which exit code that is, `main` knows
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            assert ast.unparse(raised) != "SystemExit", f"line {node.lineno}"
        if isinstance(node, ast.Call):
            ended = ("sys.exit", "exit", "quit", "os._exit", "SystemExit")
            assert ast.unparse(node.func) not in ended, f"line {node.lineno}"


def test_one_script_runs_every_long_test():
    words = (REPOSITORY / "scripts" / "test_long.sh").read_text(encoding="utf-8").split()
    folders = [REPOSITORY / word for word in words if word.startswith("tests/")]
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        if "AIXSIM_TEST_LONG" in path.read_text(encoding="utf-8") and path != Path(__file__):
            assert any(path.is_relative_to(folder) for folder in folders), path

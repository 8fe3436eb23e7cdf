"""YAML and TOML as configs use them, within bounds, whoever wrote them.

YAML is read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), which
means what people mean: `010` is ten, `1e-4` a number, `1:30`, `no` and `2020-01-01` are texts; by
YAML 1.1 they were eight, a text, ninety, false and a date. Merge keys (`<<`) are kept.
"""

import re
import tomllib
from typing import Any

import yaml

from aixsim_cli.errors import UserError

# of a file in bytes, and of a YAML document written out in full, aliases expanded, in characters
MAX_SIZE = 1 << 18
MAX_TOML_SIZE = 1 << 16
# tomllib takes the square of the length of a dotted key
_MAX_TOML_DOTS = 500
_MAX_DEPTH = 50
_MAX_DIGITS = 100
# what a node costs beside its own characters
_NODE_SIZE = 8

# key -> its line, and the same of what it holds
Lines = dict[str, tuple[int, "Lines"]]

# tag, what is written so, and the characters that it begins with
_CORE: list[tuple[str, str, str]] = [
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
]


class _Loader(yaml.SafeLoader):
    """Safe loading of the core schema that refuses what is too deep, too large, or given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.name = source
        self._depth = self._size = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        line, before = self.peek_event().start_mark.line + 1, self._size
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UserError(
                f"{self.name}:{line}: is nested more deeply than {_MAX_DEPTH} levels; expected a "
                "config"
            )
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._size += _NODE_SIZE + (len(node.value) if isinstance(node.value, str) else 0)
            self._sizes[id(node)] = self._size - before
        elif id(node) in self._sizes:
            self._size += self._sizes[id(node)]
        else:
            raise UserError(f"{self.name}:{line}: an alias of what it is in; expected no loop")
        if self._size > MAX_SIZE:
            raise UserError(
                f"{self.name}:{line}: is too large up to here, with its aliases written out; "
                f"expected at most {MAX_SIZE >> 10} KiB"
            )
        if isinstance(node, yaml.MappingNode) and not is_alias:
            self._check_keys(node)
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:null":
                raise UserError(f"{self.name}:{line}: a key is no text; expected a plain word")
            if (key.tag, key.value) in seen:
                raise UserError(f"{self.name}:{line}: {key.value}: given twice; expected once")
            seen.add((key.tag, key.value))

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            line = node.start_mark.line + 1
            raise UserError(
                f"{self.name}:{line}: got a number of {len(text)} digits; expected at most "
                f"{_MAX_DIGITS}"
            )
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_yaml_float(self, node: Any) -> float:
        # .inf and .nan, which Python writes without the dot
        return float(re.sub(r"\.(?=[a-zA-Z])", "", self.construct_scalar(node)))


class _Dumper(yaml.SafeDumper):
    """Safe dumping that quotes a text which YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), [*_first, ""]
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """A YAML document, and the lines of its keys.

    Args:
        text: of one document.
        source: file, for messages.

    Raises:
        UserError: not YAML, a key given twice, or a document out of bounds, with its line.
    """
    try:
        loader = _Loader(text, source)
        try:
            node = loader.get_single_node()
            data = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    return data, _lines(node, {})


def dump_yaml(value: Any) -> str:
    """YAML that reads back to the same, by `parse_yaml` and by readers of YAML 1.1."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """A TOML document.

    Args:
        text: at most `MAX_TOML_SIZE` long.
        source: file, for messages.

    Raises:
        UserError: not TOML, or out of bounds.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _MAX_TOML_DOTS:
            raise UserError(
                f"{source}:{number}: has more than {_MAX_TOML_DOTS} dots; expected a config"
            )
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{source}: is nested too deeply; expected a config") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid TOML: {error}") from None


def _lines(node: yaml.Node | None, known: dict[int, Lines]) -> Lines:
    if not isinstance(node, yaml.MappingNode):
        return {}
    if id(node) not in known:
        known[id(node)] = {
            key.value: (key.start_mark.line + 1, _lines(value, known)) for key, value in node.value
        }
    return known[id(node)]

"""Flags that also take true or false."""

from typing import Any

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose flags may carry a value, as NewComputeBench writes them: `--compile true`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, those of flags as `--compile` or `--no-compile`."""
        return super().parse_args(ctx, self._plain_flags(args))

    def _plain_flags(self, args: list[str]) -> list[str]:
        options = [option for option in self.params if option.param_type_name == "option"]
        flags = {name: o for o in options if getattr(o, "is_flag", False) for name in o.opts}
        negated = {no: o.opts[0] for o in flags.values() for no in o.secondary_opts}
        valued = {name for option in options for name in option.opts} - flags.keys()
        argv, kept = list(args), []
        takes_words = any(option.param_type_name == "argument" for option in self.params)

        def is_value(word: str) -> bool:
            # where nothing else can stand behind a flag, it is told by the flag's name
            return not takes_words and word[:1] != "-"

        while argv:
            word = argv.pop(0)
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            if word == "--":
                return [*kept, word, *argv]
            if name in negated and (equals or (argv and argv[0].lower() in ("true", "false"))):
                said = value if equals else argv[0]
                expected = f"{negated[name]} true or {negated[name]} false"
                raise typer.BadParameter(f"got {said!r}; expected {expected}", param_hint=name)
            if name in valued and not equals:
                # whatever its value is like
                kept += [word, *argv[:1]]
                del argv[:1]
            elif name not in flags:
                kept.append(word)
            elif equals or (argv and (argv[0].lower() in ("true", "false") or is_value(argv[0]))):
                kept += _as_flag(flags[name], name, value if equals else argv.pop(0))
            else:
                kept.append(word)
        return kept


def _as_flag(option: Any, name: str, value: str) -> list[str]:
    if value.lower() not in ("true", "false"):
        raise typer.BadParameter(f"got {value!r}; expected true or false", param_hint=name)
    return [name] if value.lower() == "true" else option.secondary_opts[:1]

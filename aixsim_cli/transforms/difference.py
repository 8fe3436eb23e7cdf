"""Whether two transform configs are the same hardware, and how they differ."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aixsim_cli.transforms.config import TransformConfig, paradigms_of, parse_transform
from aixsim_cli.transforms.protocol import as_in_file
from aixsim_cli.transforms.registry import paradigm_names


def hardware_difference(
    saved: Mapping[str, Any] | None, asked: Mapping[str, Any] | None, *, source: str
) -> tuple[str, str] | None:
    """How two transform configs, None = digital, differ.

    Args:
        saved: of a checkpoint.
        asked: of the run that goes on from it.
        source: for messages.

    Returns:
        Each as a message names it beside the other: the paradigm, and where both have the same
        one, what is its own; None = the same hardware and low-rank updates.
    """
    a, b = (parse_transform(m, source=source, saved=True) if m else None for m in (saved, asked))
    if (a.transforms if a else None) == (b.transforms if b else None):
        return None
    return _name_beside(a, b), _name_beside(b, a)


def is_same_hardware(saved: Mapping[str, Any], asked: TransformConfig) -> bool:
    """Whether a saved config, its paradigms perhaps not installed, is another in other words."""
    installed = all(name in paradigm_names() for name in paradigms_of(saved))
    if not installed:
        return False
    return parse_transform(saved, source="saved", saved=True).transforms == asked.transforms


def _name_beside(config: TransformConfig | None, other: TransformConfig | None) -> str:
    if config is None:
        return "digital hardware"
    if other is None or other.name != config.name:
        return config.name
    settings, others = _settings(config), _settings(other)
    differing = [f"{key} {value}" for key, value in settings.items() if others.get(key) != value]
    return f"{config.name} ({', '.join(differing[:3]) or 'its patterns otherwise'})"


def _settings(config: TransformConfig) -> dict[str, str]:
    settings = {}
    for transform in config.transforms:
        settings["lora"] = str(transform.lora and asdict(transform.lora))
        for rule in transform.rules:
            values = {"": None} if rule.params is None else asdict(rule.params)
            settings |= {
                f"{rule.pattern}: {key}": str(as_in_file(value)) for key, value in values.items()
            }
    return settings

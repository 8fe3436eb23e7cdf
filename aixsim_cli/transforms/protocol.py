"""What a paradigm is, and what both libraries of models rely on.

A paradigm is one module: validated parameters, what replaces a module class, optionally how an
attention's two matrix products are computed. Nothing here knows torchtitan or transformers, nor
imports torch: what hardware costs is told without.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from importlib import import_module
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from aixsim_cli.transforms.counts import Counts, Product

if TYPE_CHECKING:
    from torch import nn

# of a low-rank update; the widest layers of the largest models have 53,248 channels
MAX_RANK = 65_536


@dataclass(frozen=True)
class Site:
    """A place in a model that a transform can act on.

    Args:
        name: dotted name of the module in this model; for kind "attention" the module that owns
            (or will own) the submodule `inner_attention`.
        hf_name: the same place under its Hugging Face name; equals `name` in transformers models.
            Noise is keyed by it, so both libraries draw the same noise.
        kind: "linear" for an `nn.Linear`, "attention" for the two products of an attention.
        is_head: the model's output projection, which only an explicit pattern transforms.
        aliases: what else a pattern may call it; torchtitan's name in a Hugging Face Llama.
    """

    name: str
    hf_name: str
    kind: Literal["linear", "attention"]
    is_head: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a pattern is matched with, each once."""
        return tuple(dict.fromkeys((self.name, self.hf_name, *self.aliases)))


Build = Callable[[Any, Any, Site], "nn.Module"]
BuildAttention = Callable[[Any, Site], "nn.Module"]


class _Imported:
    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, instance: object, owner: type) -> Any:
        module, _, name = self._path.partition(":")
        return getattr(import_module(module), name)


def imported(path: str) -> Any:
    """A `modules` or `attention` that is imported when it is first used, and torch with it.

    Args:
        path: "module:attribute".
    """
    return _Imported(path)


def param(
    default: Any, meaning: str, *, unit: str = "", source: str = "", before: Any = MISSING
) -> Any:
    """A field of a paradigm's parameters that `aixsim transforms show` can explain.

    Args:
        default: value where a transform file says nothing.
        meaning: what it is and which values it takes.
        unit: of the value; "" = none.
        source: who says so: a paper, an equation, a tool.
        before: the default of earlier versions, where it was another one: what is meant by a config
            that was saved without a value. What is saved now has them all.
    """
    metadata = {"meaning": meaning, "unit": unit, "source": source}
    if before is not MISSING:
        metadata["before"] = before
    return field(default=default, metadata=metadata)


def defaults_before(params: type) -> dict[str, Any]:
    """Parameters whose default was another one in earlier versions -> that one."""
    return {f.name: f.metadata["before"] for f in fields(params) if "before" in f.metadata}


def as_in_file(value: Any) -> Any:
    """A parameter's value as a transform file has it."""
    if isinstance(value, Enum):
        return value.value
    return list(map(as_in_file, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Lora:
    """The low-rank update of a frozen weight, W + (alpha / r) B A (LoRA, arXiv 2106.09685).

    Raises:
        ValueError: a value is out of range.
    """

    r: int = param(32, "rank of the update", source="arXiv 2106.09685, section 4.1")
    alpha: float = param(32, "the update is scaled by alpha / r", source="arXiv 2106.09685")

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r: got {self.r}; expected 1 or more")
        if self.r > MAX_RANK:
            raise ValueError(f"r: got {self.r}; expected at most {MAX_RANK}")
        if not self.alpha > 0:
            raise ValueError(f"alpha: got {self.alpha}; expected a number above 0")


class Paradigm:
    """One compute paradigm, registered under a name (`transforms/registry.py`).

    Attributes:
        params: frozen dataclass, its fields made by `param`; `__post_init__` raises ValueError for
            a value out of range.
        modules: module class -> `build(module, params, site)`. A replacement of a linear
            subclasses `nn.Linear` and has its very parameters, so that state-dict names, sharding
            plans and optimizers do not notice: `SimulatedLinear.from_linear` builds one.
        attention: `build(params, site)` of the module that computes the two products of an
            attention; None = they stay digital. The module's forward is `f(q, k, v, *,
            attn_mask=None, scale=None, is_causal=True, enable_gqa=False)` with q (B, H, Lq, D), k
            (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv), out (B, H, Lq, Dv), as
            `torch.nn.functional.scaled_dot_product_attention`, but causal unless it is told
            otherwise: torchtitan's models do not say. `attn_mask` is bool (True = attend)
            or additive, broadcastable to (B, H, Lq, Lk); a learned one wants a gradient.
            `is_causal` comes with Lq = Lk and no mask.
    """

    params: ClassVar[type]
    modules: ClassVar[Mapping[type["nn.Module"], Build]]
    attention: ClassVar[BuildAttention | None] = None

    @classmethod
    def has_attention(cls) -> bool:
        """Whether it computes an attention's products; nothing is imported to tell."""
        return getattr_static(cls, "attention") is not None

    @staticmethod
    def bypassed(params: Any) -> bool:
        """Whether these parameters ask to leave the module digital."""
        return False

    @staticmethod
    def count(params: Any, product: Product) -> Counts:
        """What one matrix product takes of the hardware, a token; here all of it is digital.

        Args:
            params: of the rule that simulates its place.
            product: its size, and the arrays that it is computed on.
        """
        return Counts(digital_macs=product.macs)

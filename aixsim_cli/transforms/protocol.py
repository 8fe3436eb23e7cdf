"""What a paradigm is, and what both backends rely on.

A paradigm is one module: validated parameters, what replaces a module class, optionally how an
attention's two matrix products are computed. Nothing here knows torchtitan or transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn


@dataclass(frozen=True)
class Site:
    """A place in a model that a transform can act on.

    Args:
        name: dotted name of the module in this model; for kind "attention" the module that owns
            (or will own) the submodule `inner_attention`.
        hf_name: the same place under its Hugging Face name; equals `name` in transformers models.
            Noise is keyed by it, so both backends draw the same noise.
        kind: "linear" for an `nn.Linear`, "attention" for the two products of an attention.
        is_head: the model's output projection, which only an explicit pattern transforms.
    """

    name: str
    hf_name: str
    kind: Literal["linear", "attention"]
    is_head: bool = False


Build = Callable[[Any, Any, Site], nn.Module]


class Paradigm(ABC):
    """One compute paradigm, registered under a name (`transforms/registry.py`).

    Attributes:
        params: frozen dataclass; `__post_init__` raises ValueError for a value out of range.
        modules: module class -> `build(module, params, site)`. A replacement of a linear
            subclasses `nn.Linear` and adopts its parameters, so that state-dict names, sharding
            plans and optimizers do not notice.
    """

    params: ClassVar[type]
    modules: ClassVar[Mapping[type[nn.Module], Build]]

    @staticmethod
    def attention(params: Any, site: Site) -> nn.Module | None:
        """The module that computes attention, or None where the paradigm leaves it digital.

        Its forward is `f(q, k, v, *, attn_mask=None, scale=None, is_causal=False,
        enable_gqa=False)` with q (B, H, Lq, D), k and v (B, Hkv, Lk, D), out (B, H, Lq, D), as
        `torch.nn.functional.scaled_dot_product_attention`.
        """
        return None

    @staticmethod
    @abstractmethod
    def bypassed(params: Any) -> bool:
        """Whether these parameters ask to leave the module digital."""

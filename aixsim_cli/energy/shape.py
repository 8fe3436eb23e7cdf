"""What a model multiplies, as plain numbers: nothing is built, and torch is not imported."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from aixsim_cli.config.flavors import Flavor, find_flavor
from aixsim_cli.models.names import hf_name
from aixsim_cli.transforms.protocol import Site

# operations a value: square, sum, scale, gain; and a multiply-add with a half-turned one
_NORM, _ROPE = 4, 3
# sigmoid of four, and one product, two where there is a gate
_ACTIVATION = 5
# maximum, difference, exponential of two, sum, quotient
SOFTMAX = 6


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Args:
        kind: what tables call it.
        k: inputs.
        n: outputs.
        site: where it is; None = out of every transform's reach.
    """

    kind: str
    k: int
    n: int
    site: Site | None


@dataclass(frozen=True)
class Attention:
    """The two products of an attention, q kᵀ and p v.

    Args:
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: width of each.
        site: where it is; None = out of every transform's reach.
    """

    heads: int
    kv_heads: int
    head_dim: int
    site: Site | None


Place = Linear | Attention


@dataclass(frozen=True)
class Shape:
    """What a model multiplies and what else it does, a token.

    Args:
        name: as the user calls it.
        places: its linears and attentions, in its order.
        parameters: without the input embedding, as token budgets count them.
        ops: operations that are neither a product nor a softmax: norms, rotary embedding,
            activations, residual sums.
        notes: what is not counted.
    """

    name: str
    places: tuple[Place, ...]
    parameters: int
    ops: int
    notes: tuple[str, ...] = ()

    @cached_property
    def sites(self) -> list[Site]:
        """Every place that a transform can simulate."""
        return [place.site for place in self.places if place.site is not None]

    def digital_ops(self, seen: float) -> float:
        """Operations around the products, a token.

        Args:
            seen: tokens that an attention sees, on average.
        """
        heads = sum(place.heads for place in self.places if isinstance(place, Attention))
        return self.ops + SOFTMAX * seen * heads


def other_ops(
    *, dim: int, layers: int, heads: int, ffn: int, gated: bool = True, rotary: bool = True
) -> int:
    """Operations a token of norms (two a layer and a last one), sums, rotary embedding, activation.

    Args:
        dim: width of the residual stream.
        layers: blocks.
        heads: width of all heads of queries and keys.
        ffn: width of the feed-forward layer.
        gated: whether its activation multiplies another output.
        rotary: whether queries and keys are turned.
    """
    norms_and_sums = 2 * _NORM * dim + 2 * dim
    turned = _ROPE * heads if rotary else 0
    return layers * (norms_and_sums + turned + (_ACTIVATION + gated) * ffn) + _NORM * dim


def shape_of_flavor(arch: str, flavor: str, vocab_size: int) -> Shape:
    """A torchtitan Llama; nothing is built, and torch is not imported.

    Args:
        arch: "aixsim" or "llama3".
        flavor: within it.
        vocab_size: rows of the output projection.

    Raises:
        UserError: there is no such flavor.
    """
    name = flavor if arch == "aixsim" else f"{arch}/{flavor}"
    return shape_of_llama(name, find_flavor(arch, flavor), vocab_size)


def shape_of_llama(name: str, size: Flavor, vocab_size: int) -> Shape:
    """A Llama of any size.

    Args:
        name: as tables call it.
        size: its numbers.
        vocab_size: rows of the output projection.
    """
    head_dim = size.dim // size.n_heads
    kv = head_dim * size.n_kv_heads
    widths = {
        "attention.wq": (size.dim, size.dim),
        "attention.wk": (size.dim, kv),
        "attention.wv": (size.dim, kv),
        "attention.wo": (size.dim, size.dim),
        "feed_forward.w1": (size.dim, size.ffn_dim),
        "feed_forward.w2": (size.ffn_dim, size.dim),
        "feed_forward.w3": (size.dim, size.ffn_dim),
    }
    places: list[Place] = []
    for layer in range(size.n_layers):
        owner = f"layers.{layer}.attention"
        site = Site(owner, hf_name(owner), "attention")
        places.append(Attention(size.n_heads, size.n_kv_heads, head_dim, site))
        places += [_linear(f"layers.{layer}.{name}", *width) for name, width in widths.items()]
    places.append(_linear("output", size.dim, vocab_size))
    return Shape(
        name,
        tuple(places),
        parameters=weights_of(places) + size.dim * (2 * size.n_layers + 1),
        ops=other_ops(dim=size.dim, layers=size.n_layers, heads=size.dim + kv, ffn=size.ffn_dim),
    )


def _linear(name: str, k: int, n: int) -> Linear:
    kind, is_head = name.rpartition(".")[2], name == "output"
    return Linear(kind, k, n, Site(name, hf_name(name), "linear", is_head=is_head))


def weights_of(places: Iterable[Place]) -> int:
    """Number of weights of the linears."""
    return sum(place.k * place.n for place in places if isinstance(place, Linear))

"""Model sizes, as plain numbers: no model is built, and torch is not imported, to count them."""

from dataclasses import dataclass

from aixsim_cli.errors import UserError, nearest


@dataclass(frozen=True)
class Flavor:
    """A Llama's size.

    Args:
        dim: width of the residual stream.
        n_layers: blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        ffn_dim_multiplier: of the feed-forward width; None = 1.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        rope_theta: base of the rotary embedding.
        norm_eps: of RMSNorm.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim_multiplier: float | None = 1.3
    multiple_of: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, by torchtitan's rule."""
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of


FLAVORS: dict[str, dict[str, Flavor]] = {
    "aixsim": {
        "debug": Flavor(128, 2, 4, 2),
        # its head dimension at half and twice its width
        "debug-64": Flavor(64, 2, 2, 1),
        "debug-256": Flavor(256, 2, 8, 4),
        "60M": Flavor(384, 22, 6, 2),
        "200M": Flavor(768, 24, 12, 4),
        "400M": Flavor(960, 30, 15, 5),
        "600M": Flavor(1152, 32, 18, 6),
        "1.1B": Flavor(1536, 32, 24, 8),
    },
    # torchtitan's own; its adapter and its RoPE scaling apply
    "llama3": {
        "debugmodel": Flavor(256, 6, 16, 16, None, 256, 500000.0),
        "8B": Flavor(4096, 32, 32, 8, 1.3, 1024, 500000.0),
        "70B": Flavor(8192, 80, 64, 8, 1.3, 4096, 500000.0),
        "405B": Flavor(16384, 126, 128, 8, 1.2, 4096, 500000.0),
    },
}
# the vocabulary that torchtitan's llama3 flavors are built with, whatever the tokenizer
LLAMA3_VOCAB_SIZES = {"debugmodel": 2048, "8B": 128256, "70B": 128256, "405B": 128256}


def find_flavor(arch: str, flavor: str) -> Flavor:
    """The size of a flavor.

    Raises:
        UserError: no such architecture or flavor.
    """
    if arch not in FLAVORS:
        raise UserError(f"model architecture: got {arch!r}{nearest(arch, FLAVORS)}")
    if flavor not in FLAVORS[arch]:
        raise UserError(f"model flavor of {arch}: got {flavor!r}{nearest(flavor, FLAVORS[arch])}")
    return FLAVORS[arch][flavor]


def model_vocab_size(arch: str, flavor: str, tokenizer_vocab_size: int) -> int:
    """Rows of the model's embedding: the tokenizer's, or what a llama3 flavor has fixed.

    Raises:
        UserError: the tokenizer has more tokens than the flavor.
    """
    if arch != "llama3":
        return tokenizer_vocab_size
    rows = LLAMA3_VOCAB_SIZES[flavor]
    if tokenizer_vocab_size > rows:
        raise UserError(
            f"model.flavor: llama3 {flavor} has {rows} words; the tokenizer has "
            f"{tokenizer_vocab_size}; expected a tokenizer that fits, or model.name: aixsim"
        )
    return rows


def count_parameters(flavor: Flavor, vocab_size: int, *, embedding: bool = False) -> int:
    """Number of parameters of an untied Llama.

    Args:
        flavor: its size.
        vocab_size: rows of the embedding and of the output projection.
        embedding: count the input embedding too; token budgets leave it out.
    """
    head_dim = flavor.dim // flavor.n_heads
    attention = 2 * flavor.dim * head_dim * (flavor.n_heads + flavor.n_kv_heads)
    feed_forward = 3 * flavor.dim * flavor.ffn_dim
    block = attention + feed_forward + 2 * flavor.dim
    projections = vocab_size * flavor.dim * (2 if embedding else 1)
    return flavor.n_layers * block + flavor.dim + projections

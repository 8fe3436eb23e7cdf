"""Peak memory of a training step, optical against digital.

Forward and backward of one transformer block (attention and gated FFN, each with its norm) of a
flavor, and of causal attention alone by length. The peak is what the allocator held at once beyond
inputs and weights.

    python scripts/bench_memory.py --flavor 60M --lengths 1024 2048 4096 8192
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from aixsim_kernels import note_set, optical_attention, optical_linear
from bench_kernels import DTYPES, FLAVORS, HEAD_DIM, OPTICAL
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

KEY = 1
WIDE = {3: (4.0, 4.0, 80.0), 5: (4.0, 4.0, 40.0, 4.0, 4.0)}


def ranges(n: int, device: str) -> Tensor:
    wide = torch.tensor(WIDE[n], device=device)
    ranges = torch.stack([-wide, wide], 1)
    note_set(ranges)
    return ranges


def linear(x: Tensor, w: Tensor, optical: bool) -> Tensor:
    if not optical:
        return F.linear(x, w)
    key = torch.tensor(KEY, device=x.device)
    return optical_linear(x, w, None, ranges(3, x.device.type), key, **OPTICAL)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, optical: bool) -> Tensor:
    if not optical:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    key = torch.tensor(KEY, device=q.device)
    return optical_attention(
        q, k, v, None, ranges(5, q.device.type), key, **OPTICAL,
        scale=HEAD_DIM**-0.5, is_causal=True, attention_range="unit",
    )[0]  # fmt: skip


def block(x: Tensor, weights: dict[str, Tensor], optical: bool) -> Tensor:
    """A Llama block without rotary embedding: (B, L, dim) -> (B, L, dim)."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    h = F.rms_norm(x, x.shape[-1:])
    q, k, v = (heads(linear(h, weights[name], optical)) for name in ("wq", "wk", "wv"))
    out = attention(q, k, v, optical).transpose(1, 2).flatten(2)
    x = x + linear(out, weights["wo"], optical)
    h = F.rms_norm(x, x.shape[-1:])
    gate = F.silu(linear(h, weights["w1"], optical)) * linear(h, weights["w3"], optical)
    return x + linear(gate, weights["w2"], optical)


def peak_mib(step: Callable[[], object], device: str) -> float:
    """Largest sum of what a call has allocated and not yet freed, in MiB."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flavor", choices=FLAVORS, default="60M")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="of the block's sequences")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    dim, n_heads, kv_heads, hidden = FLAVORS[args.flavor]
    like = {"device": args.device, "dtype": DTYPES[args.dtype], "requires_grad": True}

    sizes = {
        "wq": (dim, dim), "wk": (kv_heads * HEAD_DIM, dim), "wv": (kv_heads * HEAD_DIM, dim),
        "wo": (dim, dim), "w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden),
    }  # fmt: skip
    weights = {name: torch.randn(size, **like) for name, size in sizes.items()}
    x = torch.randn(args.batch, args.length, dim, **like)

    print("| what | shape | digital MiB | optical MiB | ratio |")
    print("|---|---|---|---|---|")

    def row(what: str, shape: str, step: Callable[[bool], object]) -> None:
        digital, optical = (peak_mib(lambda o=o: step(o), args.device) for o in (False, True))
        print(f"| {what} | {shape} | {digital:.1f} | {optical:.1f} | {optical / digital:.2f} |")

    def block_step(optical: bool) -> object:
        return torch.autograd.grad(block(x, weights, optical).sum(), [x, *weights.values()])

    row(f"{args.flavor} block", f"{args.batch} x {args.length}", block_step)
    for length in args.lengths:
        qkv = [torch.randn(1, h, length, HEAD_DIM, **like) for h in (n_heads, kv_heads, kv_heads)]

        grad = torch.randn_like(qkv[0])

        def attention_step(optical: bool, qkv: list[Tensor] = qkv, grad: Tensor = grad) -> object:
            q, k, v = qkv
            return torch.autograd.grad(attention(q, k, v, optical), qkv, grad)

        row(f"{args.flavor} attention", f"1 x {length}", attention_step)


if __name__ == "__main__":
    main()

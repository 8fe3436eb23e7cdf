"""Perplexity: the exponential of the mean negative log likelihood of a text's tokens."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from aixsim_cli.errors import UserError
from aixsim_cli.models.load import LanguageModel


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Args:
        tokens: how many were predicted and scored.
        nll: mean negative log likelihood, nats per token.
        windows: of each window, its negative log likelihood summed over its tokens, in nats.
    """

    tokens: int
    nll: float
    windows: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite beyond what a float holds."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


@torch.inference_mode()
def perplexity(
    model: LanguageModel,
    windows: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    num_batches: int | None = None,
    noise_seed: int = 0,
) -> Perplexity:
    """Score a text, every token weighing the same.

    Args:
        model: what to score with.
        windows: (inputs, labels) of int64 (L,), from `heldout_windows`; the last may be shorter.
        batch_size: windows a forward.
        num_batches: stop after so many; None = score everything.
        noise_seed: of the hardware's noise; another one draws it anew, everything else the same.

    Raises:
        UserError: there is nothing to score.
    """
    device = next(model.module.parameters()).device
    if model.state is not None:
        model.state.begin_step(noise_seed)
    total, tokens, of_windows = 0.0, 0, []
    for index, (inputs, labels) in enumerate(batches(windows, batch_size)):
        if num_batches is not None and index >= num_batches:
            break
        logits = model.logits(inputs.to(device)).float()
        nll = F.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), reduction="none")
        # summed in float64: the mean of a long text is exact to the last digit shown
        nll = nll.double()
        total += nll.sum().item()
        of_windows += nll.view(labels.shape).sum(1).tolist()
        tokens += labels.numel()
    if not tokens:
        raise UserError("nothing to score: the dataset's held-out part has fewer than two tokens")
    return Perplexity(tokens, total / tokens, tuple(of_windows))


def batches(
    windows: Iterable[tuple[Tensor, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack windows of equal length; a shorter last one makes a batch of its own."""
    pending: list[tuple[Tensor, Tensor]] = []
    for window in windows:
        if pending and (len(pending) == batch_size or len(window[0]) != len(pending[0][0])):
            yield _stack(pending)
            pending = []
        pending.append(window)
    if pending:
        yield _stack(pending)


def _stack(windows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*windows, strict=True)
    return torch.stack(inputs), torch.stack(labels)

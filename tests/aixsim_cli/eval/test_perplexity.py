"""Perplexity: exact, whatever the batch, to the last partial window."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from aixsim_cli.errors import UserError
from aixsim_cli.eval.perplexity import Perplexity, perplexity
from aixsim_cli.models.load import LanguageModel

VOCAB = 11


class Bigram(nn.Module):
    """A model whose next-token distribution depends on the last token alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, tokens):
        return self.table(tokens)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(Bigram(), None, 8, None, None)


def windows(stream, length):
    for start in range(0, len(stream) - 1, length):
        chunk = stream[start : start + length + 1]
        yield chunk[:-1], chunk[1:]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("tokens", [2, 8, 9, 31])
def test_is_the_mean_over_all_tokens(model, tokens, batch_size):
    stream = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(tokens))
    logp = torch.log_softmax(model.module.table.weight.detach().double(), -1)
    expected = -sum(logp[a, b] for a, b in pairwise(stream)) / (tokens - 1)
    result = perplexity(model, windows(stream, 8), batch_size=batch_size)
    assert result.tokens == tokens - 1
    assert result.nll == pytest.approx(float(expected), rel=1e-6)


def test_num_batches_stops_there(model):
    stream = torch.arange(65) % VOCAB
    result = perplexity(model, windows(stream, 8), batch_size=2, num_batches=3)
    assert result.tokens == 3 * 2 * 8


def test_nothing_to_score(model):
    with pytest.raises(UserError, match="nothing to score"):
        perplexity(model, [], batch_size=2)


def test_perplexity_is_the_exponential():
    assert Perplexity(tokens=3, nll=math.log(7)).perplexity == pytest.approx(7)

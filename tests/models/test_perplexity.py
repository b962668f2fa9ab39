"""Perplexity: the formula, and on real weights and a real text what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from comm.group import Group
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.perplexity import perplexity
from models.presets import PRESETS
from models.tokenizer.open import load_codec
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

WINDOW = 256  # tokens of the text's 635


def text() -> str:
    """What follows the line that names the source."""
    whole = Path(__file__).with_name("perplexity.txt").read_text(encoding="utf-8")
    return whole.split("\n\n", 1)[1]


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    config = PRESETS["tiny"]
    weights = random_checkpoint(expected_shapes(config), seed=3)
    return load_model(config, weights, Group(0, 1), torch.float32)


@torch.no_grad()
def test_logits_of_every_token_are_those_of_each(tiny: Decoder) -> None:
    tokens = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(1))
    tiny.setup(2, 16)
    every = tiny.all_logits(tokens, torch.arange(9))
    assert every.shape == (2, 9, 512) and every.dtype == torch.float32
    for i in range(9):
        torch.testing.assert_close(tiny(tokens, torch.arange(9), torch.tensor([i])), every[:, i])
    # The cache is written, too: the next token goes on from there.
    following = tiny(tokens[:, :1], torch.tensor([9]))
    again = tiny.all_logits(torch.cat([tokens, tokens[:, :1]], dim=1), torch.arange(10))[:, 9]
    torch.testing.assert_close(following, again)


@torch.no_grad()
def test_the_formula(tiny: Decoder) -> None:
    tokens = torch.randint(0, 512, (3, 7), generator=torch.Generator().manual_seed(2))
    # A token at a time, with the probability of what came.
    tiny.setup(3, 7)
    logs = []
    for i in range(6):
        probabilities = tiny(tokens[:, i : i + 1], torch.tensor([i])).double().softmax(-1)
        logs.append(probabilities.gather(1, tokens[:, i + 1 : i + 2]).log())
    wanted = torch.cat(logs).mean().neg().exp().item()
    assert perplexity(tiny, tokens) == pytest.approx(wanted, rel=1e-5)
    head = tiny.head.weight.clone()
    tiny.head.weight.zero_()  # every token is as likely as every other
    assert perplexity(tiny, tokens) == pytest.approx(512, rel=1e-6)
    tiny.head.weight.copy_(head)


@pytest.mark.slow
@torch.no_grad()
def test_real_weights_and_a_real_text_as_transformers_has_it(gguf: Path, reference_model: Any) -> None:
    checkpoint = open_checkpoint(gguf)
    model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
    tokens = torch.tensor([load_codec(checkpoint).encode(text(), True)[:WINDOW]])
    assert tokens.shape == (1, WINDOW)
    ours = perplexity(model, tokens)
    theirs = reference_model(tokens, labels=tokens).loss.exp().item()
    assert ours == pytest.approx(theirs, rel=1e-3)
    # The order of words is what a model goes by: a broken one does no better on the text as it is.
    short = tokens[:, :64]
    shuffled = short[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled) > 5 * perplexity(model, short)

"""The random numbers: published answers, and what a stream of them must look like."""

from __future__ import annotations

import pytest
import torch

from models.philox import philox, uniform

# From the file kat_vectors of Random123, the authors' library: "philox4x32 10".
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), ANSWERS)
def test_blocks_are_the_published_ones(counter: str, key: str, wanted: str) -> None:
    a, b, c, d = (int(word, 16) for word in counter.split())
    first, second = (int(word, 16) for word in key.split())
    assert " ".join(f"{word:08x}" for word in philox((a, b, c, d), (first, second))) == wanted


def test_numbers_are_the_blocks_words() -> None:
    seed, counter = 0x299F31D0A4093822, 0x85A308D3243F6A88
    words = philox((0x243F6A88, 0x85A308D3, 7, 1), (0xA4093822, 0x299F31D0))
    third = (words[0] * 2**32 + words[1]) / 2**64
    numbers = uniform(seed, counter, 7, 3)
    assert numbers[2] == pytest.approx(third, abs=2**-52) and numbers[:2] == uniform(
        seed, counter, 7, 2
    )


def test_the_ends_of_the_range_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.philox.philox", lambda counter, key: (0, 0, 2**32 - 1, 2**32 - 1))
    assert uniform(0, 0, 0, 2) == [2.0**-53, 1 - 2.0**-53]


def test_seeds_counters_and_streams_have_numbers_of_their_own() -> None:
    distinct = [
        value
        for s in (0, 1, 2**32, -1)
        for at in (0, 1, 2**32)
        for stream in (0, 1)
        for value in uniform(s, at, stream, 4)
    ]
    assert len(set(distinct)) == 4 * 3 * 2 * 4


@pytest.mark.parametrize("along", ["seeds", "counters"])
def test_neighbors_fill_the_square_evenly(along: str) -> None:
    """Pairs of consecutive numbers in a grid of 16 x 16; 255 degrees of freedom."""
    pairs = [(i, 0) if along == "seeds" else (0, i) for i in range(8001)]
    numbers = torch.tensor([uniform(*pair, 0, 1) for pair in pairs], dtype=torch.float64)
    cells = (numbers.squeeze(1) * 16).long()
    found = torch.bincount(cells[:-1] * 16 + cells[1:], minlength=256).double()
    expected = 8000 / 256
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = torch.tensor(255 / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-6

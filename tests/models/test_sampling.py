"""Sampling against transformers' processors, OpenAI's formulas and statistics of the draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from base.errors import InputError
from models.limits import largest
from models.sampling import (
    Choice,
    Sampler,
    Sampling,
    choose,
    distribution,
    draw,
    make_sampler,
    record,
    start_row,
)
from models.sampling_params import check_sampling

# Of a right program one test in a million fails, were the seeds not fixed.
ALARM = 1e-6


def sampler_of(*rows: Sampling, vocab_size: int, prompt: tuple[int, ...] = ()) -> Sampler:
    sampler = make_sampler(len(rows), vocab_size)
    for row, sampling in enumerate(rows):
        start_row(sampler, row, sampling, prompt)
    return sampler


def choose_one(sampling: Sampling, logits: Tensor, made: int = 0) -> Choice:
    sampler = sampler_of(sampling, vocab_size=len(logits))
    return choose(sampler, logits.unsqueeze(0), torch.tensor([made]))


def of_transformers(logits: Tensor, sampling: Sampling, seen: list[int]) -> Tensor:
    from transformers.generation import logits_process as hf

    processors = [
        hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        hf.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.logit_bias:
        bias: list[list[list[int] | float]] = [[[token], value] for token, value in sampling.logit_bias]
        processors.insert(0, hf.SequenceBiasLogitsProcessor(bias))
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    processors += [hf.TopPLogitsWarper(sampling.top_p), hf.MinPLogitsWarper(sampling.min_p)]
    for processor in processors:
        logits = processor(torch.tensor([seen]), logits)
    return logits.softmax(-1)


SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "temperature": {"temperature": st.floats(0.1, 5)},
    "top_k": {"top_k": st.integers(1, 700)},
    "top_p": {"top_p": st.floats(0.01, 0.99)},
    "min_p": {"min_p": st.floats(0.001, 0.9)},
    "repetition": {"repetition_penalty": st.floats(0.3, 3)},
    "bias": {"logit_bias": st.just(((7, 5.0), (3, -100.0), (12, 0.25)))},
}
SETTINGS["combined"] = {
    name: values for setting in list(SETTINGS.values()) for name, values in setting.items()
}


@pytest.mark.parametrize("setting", SETTINGS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_distributions_are_those_of_transformers(setting: str, data: st.DataObject) -> None:
    values: dict[str, Any] = data.draw(
        st.fixed_dictionaries({"temperature": st.just(1.0), **SETTINGS[setting]})
    )
    sampling = Sampling(**values)
    # Beyond the first candidates, and flat enough that top_p wants more of them.
    vocab_size = data.draw(st.sampled_from([40, 600]))
    spread = data.draw(st.sampled_from([0.3, 2.0, 8.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(1, vocab_size, generator=generator) * spread
    prompt, answer = [1, 5, 7, 7, 39], [2, 5, 2]
    sampler = sampler_of(sampling, vocab_size=vocab_size, prompt=tuple(prompt))
    record(sampler, 0, answer)
    wanted = of_transformers(logits, sampling, prompt + answer)
    made = distribution(sampler, logits)
    # A limit may fall on the other side of a token whose sum or quotient equals it but for rounding.
    differs = ((made > 0) != (wanted > 0)).sum()
    if differs == 0:
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-7)
    else:
        assert differs == 1 and on_the_edge(logits, sampling, made, wanted)


def on_the_edge(logits: Tensor, sampling: Sampling, made: Tensor, wanted: Tensor) -> bool:
    """Whether the larger set's rarest token is let through by less than rounding."""
    larger = max(made, wanted, key=lambda p: int((p > 0).sum()))
    last = larger[larger > 0].min()
    mass = (larger[larger > last].sum() - sampling.top_p).abs()
    ratio = (last / larger.max() - sampling.min_p).abs()
    return bool(mass < 1e-5 or ratio < 1e-6)


def test_the_reference_depends_on_each_limit() -> None:
    """What the test above compares does depend on every setting, and on the order of the limits."""
    logits = torch.linspace(-2, 2, 40).unsqueeze(0)
    base = of_transformers(logits, Sampling(1.0), [1, 39])
    changes: list[dict[str, Any]] = [
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": ((7, 5.0),)},
    ]
    for change in changes:
        sampling = Sampling(**{"temperature": 1.0, **change})
        other = of_transformers(logits, sampling, [1, 39])
        assert not torch.allclose(base, other, atol=1e-3)
        mine = distribution(sampler_of(sampling, vocab_size=40, prompt=(1, 39)), logits)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(-2, 2), st.floats(-2, 2), st.lists(st.integers(0, 9), max_size=12), st.integers(0, 99))
def test_presence_and_frequency_follow_the_published_formula(
    presence: float, frequency: float, answer: list[int], seed: int
) -> None:
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence (OpenAI's manual)."""
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(1.0, presence_penalty=presence, frequency_penalty=frequency)
    sampler = sampler_of(sampling, vocab_size=10, prompt=(0, 1, 2))
    record(sampler, 0, answer)
    counts = torch.tensor([float(answer.count(j)) for j in range(10)])
    wanted = (logits - counts * frequency - (counts > 0).float() * presence).softmax(-1)
    torch.testing.assert_close(distribution(sampler, logits), wanted)


def test_what_is_chosen_is_penalized_next_time() -> None:
    logits = torch.tensor([[3.0, 2.5, 0.0], [3.0, 2.5, 0.0]])
    sampler = sampler_of(Sampling(frequency_penalty=1.0), Sampling(), vocab_size=3)
    chosen = [choose(sampler, logits, torch.tensor([i, i])).tokens.tolist() for i in range(4)]
    assert chosen == [[0, 0], [1, 0], [0, 0], [1, 0]]
    # An inactive row's tokens are not counted, and a new request starts from nothing.
    choose(sampler, logits, torch.tensor([4, 4]), torch.tensor([False, True]))
    assert int(choose(sampler, logits, torch.tensor([4, 4])).tokens[0]) == 0
    start_row(sampler, 0, Sampling(frequency_penalty=1.0), [0, 0, 0])
    assert int(choose(sampler, logits, torch.tensor([0, 0])).tokens[0]) == 0


def test_drafts_are_counted_position_by_position() -> None:
    sampling = Sampling(0.9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0))
    drafts = torch.tensor([[4, 9, 4], [4, 9, 4]])
    rows = sampling, Sampling(1.5, top_k=4)
    sampler = sampler_of(*rows, vocab_size=30, prompt=(1, 2))
    together = distribution(sampler, logits, drafts)
    for step in range(4):
        torch.testing.assert_close(distribution(sampler, logits[:, step]), together[:, step])
        if step < 3:
            record(sampler, 0, [int(drafts[0, step])])
    with pytest.raises(ValueError, match="drafts"):
        distribution(sampler, logits)


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square statistic; cells that nothing is expected in must be empty."""
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.7, top_k=6, seed=2),
        Sampling(1.3, top_p=0.9, seed=3),
        Sampling(1.2, min_p=0.2, seed=-(2**63)),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = torch.linspace(2, -1, 12).unsqueeze(0)
    sampler, total = sampler_of(sampling, vocab_size=12), 5000
    drawn = [int(choose(sampler, logits, torch.tensor([i])).tokens) for i in range(total)]
    counts = torch.bincount(torch.tensor(drawn), minlength=12)
    expected = distribution(sampler, logits)[0]
    assert p_value(counts, expected * total) > ALARM
    # So many draws do detect a distribution that is a little wrong.
    wrong = expected ** (1 / 1.4)
    assert p_value(counts, wrong / wrong.sum() * total) < ALARM


def test_draws_are_those_of_the_whole_distribution() -> None:
    """`choose` draws among the tokens that limits let through, as from all with the rest at 0."""
    from models.philox import uniform

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3000, generator=generator) * 2
    settings: list[dict[str, Any]] = [
        {},
        {"top_k": 40},
        {"top_p": 0.8},
        {"top_p": 0.95, "top_k": 900, "min_p": 0.01},
    ]
    for limits in settings:
        sampler = sampler_of(Sampling(0.9, seed=5, **limits), vocab_size=3000)
        p = distribution(sampler, logits)[0]
        for made in range(40):
            token = int(choose(sampler, logits, torch.tensor([made])).tokens)
            assert token == int(draw(p, uniform(5, made, 0, 1)[0]))


def test_the_extremes_of_a_draw() -> None:
    weight = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.3, 0.0])
    assert int(draw(weight, 2.0**-53)) == 1
    assert int(draw(weight, 1 - 2.0**-53)) == 4
    # On a boundary: the next token that has any weight.
    assert int(draw(torch.tensor([0.5, 0.0, 0.5]), 0.5)) == 2


def test_a_row_depends_on_nothing_but_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 40000, generator=generator) * 3
    rows = [
        Sampling(1.0, seed=4),
        Sampling(0.8, top_k=30, top_p=0.9, seed=4),
        Sampling(1.2, top_p=0.99, seed=9, repetition_penalty=1.1),
        Sampling(),
        Sampling(0.6, min_p=0.1, seed=11, frequency_penalty=1.0),
    ]
    made = torch.tensor([0, 3, 8, 1, 2**40])
    order = torch.tensor([3, 0, 4, 2, 1])

    def run(places: Tensor) -> tuple[Tensor, Tensor]:
        sampler = sampler_of(*[rows[i] for i in places], vocab_size=40000, prompt=(1, 2, 3))
        p = distribution(sampler, logits[places])
        return choose(sampler, logits[places], made[places]).tokens, p

    tokens, p = run(torch.arange(5))
    moved, moved_p = run(order)
    assert torch.equal(moved, tokens[order]) and torch.equal(moved_p, p[order])
    for row in range(5):
        alone, alone_p = run(torch.tensor([row]))
        assert torch.equal(alone, tokens[row : row + 1]) and torch.equal(alone_p, p[row : row + 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        other, other_p = run(torch.arange(5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(other, tokens) and torch.equal(other_p, p)


def test_inactive_rows_are_left_alone() -> None:
    logits = torch.zeros(2, 5)
    logits[1] = torch.nan
    sampler = sampler_of(Sampling(), Sampling(1.0, logprobs=2), vocab_size=5)
    active = torch.tensor([True, False])
    choice = choose(sampler, logits, torch.tensor([0, 0]), active)
    assert int(choice.tokens[0]) == 0 and choice.logprobs is None
    assert distribution(sampler, logits, active=active).sum(-1).tolist() == [1.0, 0.0]


def test_logprobs_are_those_of_the_model() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 500, generator=generator)
    changed = Sampling(5.0, top_k=9, repetition_penalty=2.0, logit_bias=((3, 9.0),), logprobs=2)
    sampler = sampler_of(changed, Sampling(logprobs=5), Sampling(1.0), vocab_size=500, prompt=(3,))
    choice = choose(sampler, logits, torch.zeros(3, dtype=torch.int64))
    wanted = logits.log_softmax(-1)
    values, tokens = wanted.topk(5)
    assert choice.logprobs is not None and choice.top_tokens is not None
    assert choice.top_logprobs is not None
    torch.testing.assert_close(choice.logprobs[:2], wanted[[0, 1], choice.tokens[:2]])
    assert torch.equal(choice.top_tokens[:2], tokens[:2])
    torch.testing.assert_close(choice.top_logprobs[:2], values[:2])
    assert choice.logprobs[2].isnan() and choice.top_tokens[2].tolist() == [-1] * 5
    none = choose_one(Sampling(logprobs=0), logits[0])
    assert none.logprobs is not None and none.top_tokens is not None
    assert none.top_tokens.shape == (1, 0) and float(none.logprobs) == float(wanted[0].max())


@pytest.mark.parametrize("vocab_size", [20, 2000, 50000])
def test_equal_logits_resolve_to_the_lowest_tokens(vocab_size: int) -> None:
    flat = torch.zeros(vocab_size)
    assert int(choose_one(Sampling(), flat).tokens) == 0
    assert all(int(choose_one(Sampling(1.0, top_k=1), flat, i).tokens) == 0 for i in range(5))
    assert largest(flat, 7).tolist() == list(range(7))
    coarse = (torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 2).round()
    for count in (1, 4, vocab_size // 3):
        wanted = sorted(range(vocab_size), key=lambda token: (-float(coarse[token]), token))[:count]
        assert largest(coarse, count).tolist() == wanted
        p = distribution(sampler_of(Sampling(1.0, top_k=count), vocab_size=vocab_size), coarse[None])
        assert p[0].nonzero().squeeze(1).tolist() == sorted(wanted)
    for top_p in (0.02, 0.5, 0.9):
        sampler = sampler_of(Sampling(1.0, top_p=top_p), vocab_size=vocab_size)
        kept = distribution(sampler, coarse[None])[0].nonzero().squeeze(1)
        ordered = largest(coarse, len(kept))
        assert torch.equal(kept, ordered.sort().values)
        mass = coarse.double().softmax(-1)[ordered]
        assert mass.sum() > top_p - 1e-5 and mass[:-1].sum() < top_p + 1e-5
    half = distribution(sampler_of(Sampling(1.0, top_p=0.5), vocab_size=vocab_size), flat[None])
    first = half[0].nonzero().squeeze(1).tolist()
    assert first == list(range(len(first))) and abs(len(first) - vocab_size // 2) <= 1


def test_extreme_logits() -> None:
    banned = torch.full((400,), -torch.inf)
    banned[[3, 9]] = 1.0
    settings: list[dict[str, Any]] = [{}, {"top_k": 300}, {"top_p": 0.9}, {"min_p": 0.5}]
    for limits in settings:
        sampling = Sampling(1.0, **limits)
        p = distribution(sampler_of(sampling, vocab_size=400), banned[None])[0]
        assert p[3] == p[9] == 0.5
        assert {int(choose_one(sampling, banned, i).tokens) for i in range(20)} == {3, 9}
    huge = torch.tensor([3e38, -3e38, 2.9e38])
    for temperature in (1e-60, 1e-9, 1.0, 1e4):
        p = distribution(sampler_of(Sampling(temperature), vocab_size=3), huge[None])
        assert p.tolist() == [[1.0, 0.0, 0.0]]
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(3, 8)
        logits[1, 5] = bad
        sampler = sampler_of(Sampling(), Sampling(0.5), Sampling(), vocab_size=8)
        with pytest.raises(InputError, match=f"row 1 is {bad}.*not a finite number"):
            choose(sampler, logits, torch.zeros(3, dtype=torch.int64))
        with pytest.raises(InputError, match=f"row 1 is {bad}"):
            distribution(sampler, logits)
    with pytest.raises(InputError, match="row 0 is -inf"):
        choose_one(Sampling(), torch.full((4,), -torch.inf))


def test_tokens_beyond_the_vocabulary_are_ignored_in_prompts() -> None:
    sampler = sampler_of(Sampling(repetition_penalty=2.0), vocab_size=4, prompt=(0, 6))
    assert int(choose(sampler, torch.tensor([[3.0, 2.0, 0, 0]]), torch.tensor([0])).tokens) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be a number at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": 2e4}, "at most 10000"),
        ({"top_k": -1}, "top_k=-1 must be an integer from 0"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0.0 must be a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": 1.0}, "min_p=1.0 must be a number at least 0 and below 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty=-2.5"),
        ({"logit_bias": ((50, 1.0),)}, "token of logit_bias=50 must be an integer from 0 to 49"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias=-1"),
        ({"logit_bias": ((4, 101.0),)}, "logit_bias of token 4=101.0"),
        ({"logit_bias": ((4, float("nan")),)}, "logit_bias of token 4=nan"),
        ({"logit_bias": ((4, 1.0), (5, 1.0), (4, 2.0))}, "names token 4 twice"),
        ({"seed": 2**63}, "seed="),
        ({"logprobs": 21}, "logprobs=21 must be an integer from -1 to 20"),
        ({"logprobs": True}, "logprobs=True"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_sampling(Sampling(**change), 50)


def test_values_at_the_ends_of_their_ranges_work() -> None:
    check_sampling(Sampling(logit_bias=((10**9, 1.0),)), None)
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    bias = ((0, -100.0), (3, 100))
    for seed, factor in ((2**63 - 1, 1e-3), (-(2**63), 1e3)):
        sampling = Sampling(1e4, 2**63 - 1, 1.0, 0.999, factor, -2, 2, bias, seed, 20)
        check_sampling(sampling, 4)
        sampler = sampler_of(sampling, vocab_size=4, prompt=(0, 1, 2, 3))
        choice = choose(sampler, logits, torch.tensor([2**62]))
        assert choice.top_tokens is not None and choice.top_tokens.tolist() == [[3, 0, 2, 1]]


def test_plain_is_greedy_and_nothing_else() -> None:
    assert Sampling(top_k=3, top_p=0.5, min_p=0.1, seed=9).is_plain
    changes: list[dict[str, Any]] = [
        {"temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": ((1, 1.0),)},
        {"logprobs": 0},
    ]
    for change in changes:
        assert not Sampling(**change).is_plain

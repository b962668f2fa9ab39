"""With draft tokens a text is the same, greedy or sampled, and takes fewer rounds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import product

import pytest
import torch

from base.errors import InputError
from comm.group import Group
from engine import speculation
from engine.loop import Watcher, generate
from engine.opening import step_names
from engine.requests import Answer, Request
from engine.resolve import check_ranks, from_json, resolve, to_json
from engine.steps import EXTEND, Runner, make_runner
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from models.sampling import Sampling
from tests.engine.chances import chi_square, limit
from tests.jobs import job_of
from tests.running import RunRanks, RunYoke
from weights.formats.random_io import random_checkpoint

ALONE = Group(0, 1)
SMALL = replace(PRESETS["tiny"], vocab_size=4, num_layers=1)
PROMPTS = ((1, 2, 3, 1, 2), (7,), tuple(range(40)), (9, 9, 9), (5, 6) * 260, (11, 12, 13), (3, 1))
DRAFTS = ("lookup", "same", "other")


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model_of(config: ModelConfig, seed: int, copy: int = 0) -> Decoder:
    """`copy`: a model has one cache, so a draft model of the same weights is another."""
    return load_model(config, random_checkpoint(expected_shapes(config), seed), ALONE, torch.float32)


def runners(
    draft: str, max_seq_len: int, num_rows: int = 3, config: ModelConfig = PRESETS["tiny"]
) -> tuple[Runner, Runner | None]:
    """The model and the draft model, without compiling."""
    kinds = {"same": model_of(config, 1, 1), "other": model_of(config, 2)}
    model = make_runner(model_of(config, 1), ALONE, max_seq_len, False, num_rows)
    if draft not in kinds:
        return model, None
    return model, make_runner(kinds[draft], ALONE, max_seq_len, False, num_rows)


def speculated(
    draft: str,
    requests: Sequence[Request],
    stops: frozenset[int] = frozenset(),
    watcher: Watcher | None = None,
    k: int = 4,
    rows: int = 3,
) -> list[Answer]:
    """Answers with draft tokens, in a cache without a position to spare."""
    model, small = runners(draft, needed(requests), rows)
    return speculation.generate(model, requests, stops, watcher, draft=small, draft_tokens=k)


def plain(
    requests: Sequence[Request], stops: frozenset[int] = frozenset(), watcher: Watcher | None = None
) -> list[Answer]:
    return generate(runners("", needed(requests))[0], requests, stops, watcher)


def needed(requests: Sequence[Request]) -> int:
    return max(len(request.prompt) + request.max_new_tokens for request in requests)


def texts(answers: Sequence[Answer]) -> list[tuple[tuple[int, ...], str]]:
    return [(answer.tokens, answer.finish) for answer in answers]


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_texts_are_those_without_drafts(draft: str) -> None:
    requests = [Request(prompt, 20 + 9 * (i % 3)) for i, prompt in enumerate(PROMPTS)]
    answers = speculated(draft, requests)
    assert texts(answers) == texts(plain(requests))
    assert [a.tokens for a in speculated(draft, requests, k=9, rows=1)] == [a.tokens for a in answers]
    drafted, accepted = (sum(getattr(a, name) for a in answers) for name in ("drafted", "accepted"))
    if draft == "same":
        assert accepted > 0.99 * drafted > 100
        # All but the first token of each four of five are draft tokens.
        assert accepted >= 0.75 * sum(len(answer.tokens) - 1 for answer in answers)
    elif draft == "lookup":
        assert 0 < accepted < drafted
    else:
        assert 0 <= accepted < 0.5 * drafted


@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_texts_and_their_logprobs_are_those_without_drafts(draft: str) -> None:
    samplings = [
        Sampling(temperature=0.2, seed=1, logprobs=2),
        Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=2),
        Sampling(presence_penalty=0.3, frequency_penalty=0.1, logprobs=0),
        Sampling(temperature=0.1, repetition_penalty=1.05, logit_bias=((5, 0.3),), seed=3),
        Sampling(),
        Sampling(temperature=0.05, seed=4),
        Sampling(temperature=0.2, seed=5),
    ]
    requests = [Request(*pair) for pair in zip(PROMPTS, [24] * 7, samplings, strict=True)]
    answers, wanted = speculated(draft, requests), plain(requests)
    assert texts(answers) == texts(wanted)
    for answer, other, sampling in zip(answers, wanted, samplings, strict=True):
        assert len(answer.logprobs) == (len(answer.tokens) if sampling.logprobs >= 0 else 0)
        for one, two in zip(answer.logprobs, other.logprobs, strict=True):
            assert one.top_tokens == two.top_tokens
            assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
            assert one.top_logprobs == pytest.approx(two.top_logprobs, abs=1e-4)
    if draft == "same":
        assert answers[4].accepted == answers[4].drafted  # greedy
        sampled = [answers[i] for i in (0, 1, 5, 6)]  # now and then the most probable token
        assert 0 < sum(a.accepted for a in sampled) < sum(a.drafted for a in sampled)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_text_ends_exactly_wherever_in_a_draft_its_end_is(draft: str) -> None:
    whole = plain([Request(PROMPTS[0], 12)])[0].tokens
    for length in range(1, 12):
        requests = [Request(PROMPTS[0], length)]
        (answer,) = speculated(draft, requests, k=5)
        assert (answer.tokens, answer.finish) == (whole[:length], "length")
        assert answer.accepted <= max(length - 2, 0)  # not the first, and one of each round
    for at, stop in enumerate(whole):
        requests = [Request(PROMPTS[0], 12), Request(PROMPTS[1], 12)]
        ends = frozenset({stop})
        answers = speculated(draft, requests, ends, k=5)
        assert texts(answers) == texts(plain(requests, ends))
        assert answers[0].finish == "stop" and len(answers[0].tokens) == whole.index(stop) <= at


def test_watchers_see_every_token_and_end_texts() -> None:
    requests = [Request(prompt, 15) for prompt in PROMPTS[:4]]
    wanted = [answer.tokens for answer in plain(requests)]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    ended: list[int] = []

    def on_token(request: int, token: int) -> bool:
        seen[request].append(token)
        return request == 1 and len(seen[1]) == 7

    def cancelled() -> set[int]:
        return {2} if len(seen[2]) > 2 else set()

    watcher = Watcher(on_token, cancelled, lambda request, answer: ended.append(request))
    answers = speculated("same", requests, frozenset(), watcher, rows=2)
    assert [answer.tokens for answer in answers] == [tuple(tokens) for tokens in seen.values()]
    assert [answer.finish for answer in answers] == ["length", "stop", "cancelled", "length"]
    lengths = [len(tokens) for tokens in seen.values()]
    assert lengths[0] == lengths[3] == 15 and lengths[1] == 7 and 2 < lengths[2] < 15
    assert all(wanted[i][: len(tokens)] == tuple(tokens) for i, tokens in seen.items())
    assert sorted(ended) == [0, 1, 2, 3]
    assert all(answer.ttft_s > 0 and answer.tpot_s > 0 for answer in answers)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_text_goes_on_from_what_is_in_the_cache(draft: str) -> None:
    model, small = runners(draft, 200, num_rows=1)
    first = Request(PROMPTS[2], 20)
    (answer,) = speculation.generate(model, [first], draft=small)
    longer = (*first.prompt, *answer.tokens, 4, 5, 6)
    known = len(first.prompt) + len(answer.tokens) - 1
    (more,) = speculation.generate(model, [Request(longer, 20, cached=known)], draft=small)
    assert more.tokens == plain([Request(longer, 20)])[0].tokens
    if draft == "same":
        assert more.accepted > 10


def test_many_slots_share_the_draft_tokens_that_one_call_has_room_for() -> None:
    requests = [Request((i % 4, i // 4 % 4), 6) for i in range(250)]
    model, _ = runners("lookup", 10, 200, SMALL)
    calls: list[int] = []
    step = model.steps[EXTEND]

    def watched(where: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        calls.append(where.shape[1])
        return step(where, wanted)

    model.steps[EXTEND] = watched
    answers = speculation.generate(model, requests, draft_tokens=4)
    assert max(calls) <= model.chunk
    assert len(calls) < 15  # a call a round: none was divided
    assert texts(answers) == texts(generate(runners("", 10, 200, SMALL)[0], requests))
    assert sum(answer.drafted for answer in answers) > 100


@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_texts_are_distributed_as_the_model_says(draft: str) -> None:
    prompt, temperature, count = [0, 1, 2, 3, 0, 1], 0.1, 6144
    model = model_of(SMALL, 1)
    model.setup(64, 16)
    endings = list(product(range(4), repeat=3))
    batch = torch.tensor([prompt + list(ending) for ending in endings])
    p = (model.all_logits(batch, torch.arange(9))[:, 5:8] / temperature).double().softmax(-1)
    wanted = {
        ending: float(torch.stack([p[i, at, token] for at, token in enumerate(ending)]).prod())
        for i, ending in enumerate(endings)
    }
    assert abs(sum(wanted.values()) - 1) < 1e-6
    runner, small = runners(draft, 16, 256, SMALL)
    requests = [
        Request(tuple(prompt), 3, Sampling(temperature=temperature, seed=seed)) for seed in range(count)
    ]
    answers = speculation.generate(runner, requests, draft=small, draft_tokens=2)
    assert 0 < sum(a.accepted for a in answers) < sum(a.drafted for a in answers)
    value, cells = chi_square(Counter(answer.tokens for answer in answers), wanted)
    assert cells > 5 and value < limit(cells)
    greedy = Counter({answers[0].tokens: count})
    assert chi_square(greedy, wanted)[0] > limit(cells)


@pytest.mark.slow
def test_two_ranks_and_one_make_the_same_texts_and_nothing_is_compiled_later(
    run_ranks: RunRanks,
) -> None:
    seen = []
    for size, compiled in ((2, False), (1, True)):
        code, out, err = run_ranks("speculation", size, "shm", compiled=compiled)
        assert code == 0, err
        seen.append(json.loads(out))
    eager, compiled = seen
    for found in (eager, compiled):
        assert found["lookup"]["tokens"] == found["small"]["tokens"] == eager["plain"]["tokens"]
    for draft in ("lookup", "small"):
        assert compiled[draft] == eager[draft]  # as many draft tokens, too
        assert sum(eager[draft]["drafted"]) > sum(eager[draft]["accepted"])
    assert sum(eager["lookup"]["accepted"]) > 0


JOB = ("model=tiny", "weights=random", "prompt=abcabc", "max_new_tokens=30")


@pytest.mark.slow
def test_the_command_reports_how_many_draft_tokens_were_accepted(run_yoke: RunYoke) -> None:
    words = ("compile=false", "dtype=float32", "max_seq_len=36", "output=json")
    reports = []
    for draft, ranks in (("lookup", 2), ("tiny", 1)):
        done = run_yoke(f"--ranks={ranks}", *JOB, *words, f"draft={draft}")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    lookup, small = reports
    assert lookup["drafted"] > lookup["accepted"] > 0
    assert small["drafted"] == small["accepted"] > 15
    assert lookup["token_ids"] == small["token_ids"] and len(small["token_ids"]) == 30


def test_a_draft_is_a_model_of_the_same_vocabulary_or_look_up() -> None:
    lookup = resolve(job_of([*JOB, "draft=lookup"]))
    assert lookup.draft is None and step_names(lookup.job, True) == (EXTEND,)
    small = resolve(job_of([*JOB, "draft=tiny", "num_layers=5", "seed=3"]))
    assert small.draft is not None and small.draft.config == PRESETS["tiny"]
    assert small.draft.job.model == "tiny" and small.draft.job.seed == 3
    assert from_json(to_json(small)) == small
    assert asdict(from_json(to_json(lookup))) == asdict(lookup)
    for words, said in (
        (["draft=lokup"], "draft=lokup is neither a preset nor a path, did you mean 'lookup'"),
        (["draft=no/model"], "draft=no/model: there is no such path"),
        (["draft=smollm2-360m"], "draft=smollm2-360m: it has a vocabulary of 49152 tokens"),
        (["draft=lookup", "draft_tokens=0"], "draft_tokens=0: must be between 1"),
    ):
        with pytest.raises(InputError, match=said):
            resolve(job_of([*JOB, *words]))
    wide = resolve(job_of([*JOB, "draft=tiny", "num_heads=8", "num_kv_heads=8"]))
    with pytest.raises(InputError, match="draft=tiny: 8 ranks for 6 query heads"):
        check_ranks(wide, 8)


def test_an_unknown_draft_is_refused_with_one_message(run_yoke: RunYoke) -> None:
    done = run_yoke(*JOB, "draft=tinny")
    assert done.returncode == 2
    assert done.stderr.startswith("error: draft=tinny") and done.stderr.count("error") == 1

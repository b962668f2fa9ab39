"""Beam search on models: what transformers finds, on any number of ranks, without copying the cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base.errors import InputError
from comm.group import Group
from engine.beam_plan import Search
from engine.beams import beam_search, find, generate_beams
from engine.loop import Watcher, generate
from engine.prompts import read_prompts
from engine.requests import Answer, Request
from engine.steps import BEAMS, EXTEND, Runner, make_runner, warm_up
from models.attention import CachedAttention
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.presets import PRESETS
from models.tokenizer.codec import byte_codec
from tests.jobs import job_of
from tests.models.families import make
from tests.running import RunRanks, RunYoke
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

VOCAB, WIDTH, COUNT = 50, 4, 14


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make("llama", vocab_size=VOCAB).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(folder)
    return load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)


def prompts(count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (1 + i % 9,), generator=random).tolist() for i in range(count)]


STOPS = frozenset({3, 11, 19, 23, 42})


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("width", "penalty", "stops"),
    [
        (4, 1.0, frozenset()),
        (4, 1.0, {7}),
        (4, 0.0, STOPS),
        (3, 2.0, STOPS),
        (7, -0.7, {7, 11}),
    ],
)
def test_texts_and_scores_are_those_of_transformers(
    width: int, penalty: float, stops: set[int], reference: Any, model: Decoder
) -> None:
    runner = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=width)
    search = Search(width, penalty, COUNT, frozenset(stops))
    stopped = 0
    for prompt in prompts(18):
        with torch.no_grad():
            wanted = reference.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=width, do_sample=False, length_penalty=penalty, early_stopping=False,
                max_new_tokens=COUNT, eos_token_id=sorted(stops) or None, pad_token_id=VOCAB - 1,
                num_return_sequences=width, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        found = find(runner, prompt, search).hypotheses
        scores = torch.tensor([h.score for h in found])
        torch.testing.assert_close(scores, wanted.sequences_scores, rtol=1e-4, atol=1e-5)
        for hypothesis, sequence in zip(found, wanted.sequences, strict=True):
            tokens = sequence[len(prompt) :].tolist()
            assert list(hypothesis.tokens) == tokens[: len(hypothesis.tokens)]
            assert hypothesis.stopped == (hypothesis.tokens[-1] in stops)
            assert hypothesis.stopped or len(hypothesis.tokens) == COUNT
            stopped += hypothesis.stopped
    assert bool(stopped) == bool(stops)


def test_answers_have_no_stop_token_and_say_why_they_end(model: Decoder) -> None:
    runner = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=WIDTH)
    requests = [Request(tuple(prompt), COUNT) for prompt in prompts(8)]
    shown: list[list[int]] = [[] for _ in requests]
    ended: list[tuple[int, Answer]] = []

    def on_token(request: int, token: int) -> bool:
        shown[request].append(token)
        return False

    def on_end(request: int, answer: Answer) -> None:
        ended.append((request, answer))

    watcher = Watcher(on_token, on_end=on_end)
    answers = generate_beams(runner, requests, STOPS, 1.0, watcher)
    assert {answer.finish for answer in answers} == {"stop", "length"}
    assert [list(answer.tokens) for answer in answers] == shown
    assert ended == list(enumerate(answers))
    for request, answer in zip(requests, answers, strict=True):
        best = find(runner, request.prompt, Search(WIDTH, 1.0, COUNT, STOPS)).hypotheses[0]
        assert answer.tokens == best.tokens[: len(answer.tokens)]
        assert len(best.tokens) == len(answer.tokens) + (answer.finish == "stop")
        assert not STOPS & set(answer.tokens)
        assert answer.ttft_s > 0
        assert answer.tpot_s > 0


def test_one_beam_is_the_greedy_loop(model: Decoder) -> None:
    runner = make_runner(model, Group(0, 1), 64, compiled=False)
    requests = [Request(tuple(prompt), COUNT) for prompt in prompts(5)]
    greedy = generate(runner, requests)
    assert [a.tokens for a in generate_beams(runner, requests)] == [a.tokens for a in greedy]


def test_a_search_that_nobody_waits_for_is_given_up(model: Decoder) -> None:
    runner = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=WIDTH)
    asked = 0

    def cancelled() -> set[int]:
        nonlocal asked
        asked += 1
        return {1} if asked > COUNT + 3 else set()

    requests = [Request((1, 2), COUNT), Request((3,), COUNT), Request((4, 5, 6), COUNT)]
    answers = generate_beams(runner, requests, watcher=Watcher(cancelled=cancelled))
    assert [a.finish for a in answers] == ["length", "cancelled", "length"]
    assert [len(a.tokens) for a in answers] == [COUNT, 0, COUNT]
    assert asked == COUNT + 4 + COUNT


def test_logits_that_are_not_numbers_are_refused(model: Decoder) -> None:
    runner = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=WIDTH)
    broken = {EXTEND: lambda where, wanted: torch.full((len(wanted), VOCAB), math.nan)}
    with pytest.raises(InputError, match="is nan, not a finite number"):
        beam_search(replace(runner, steps=runner.steps | broken), Request((1,), 5))


def test_ranks_take_the_same_steps_and_find_the_same(
    folder: Path, model: Decoder, run_ranks: RunRanks
) -> None:
    job = {"prompts": prompts(4), "width": WIDTH, "penalty": 1.0, "count": COUNT, "stops": [3, 11, 19]}
    code, out, err = run_ranks("beams", 2, "shm", folder=str(folder), **job)
    assert code == 0, err
    runner = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=WIDTH)
    search = Search(WIDTH, 1.0, COUNT, frozenset({3, 11, 19}))
    for prompt, texts in zip(prompts(4), json.loads(out), strict=True):
        hypotheses = find(runner, prompt, search).hypotheses
        assert [tuple(text["tokens"]) for text in texts] == [h.tokens for h in hypotheses]
        assert [text["score"] for text in texts] == pytest.approx([h.score for h in hypotheses])


# A text's tokens in place of its keys, and a model that sees nothing else of it.
def _next(text: list[int]) -> Tensor:
    random = torch.Generator().manual_seed(sum((token + 1) * 5**i for i, token in enumerate(text)))
    return torch.randn(4, generator=random) * 2


def _logprob(prompt: list[int], text: tuple[int, ...]) -> float:
    chances = [_next([*prompt, *text[:i]]).log_softmax(-1) for i in range(len(text))]
    return sum(float(chance[token]) for chance, token in zip(chances, text, strict=True))


def _table_runner(width: int) -> tuple[Runner, Tensor]:
    """A runner whose logits depend on every token of a text, as `sources` find them; its cache."""
    cache = torch.full((width, 16), -99)

    def run(where: Tensor, wanted: Tensor) -> Tensor:
        tokens, positions, rows = where
        cache[rows, positions] = tokens
        texts = [cache[rows[i], : positions[i] + 1].tolist() for i in wanted.tolist()]
        return torch.stack([_next(text) for text in texts])

    def beams(tokens: Tensor, positions: Tensor, sources: Tensor) -> Tensor:
        rows = torch.arange(width)
        assert (cache[rows, positions] == -99).all(), "what another beam may read is overwritten"
        cache[rows, positions] = tokens
        texts = cache[sources.long(), torch.arange(16)][:, : positions[0] + 1]
        return torch.stack([_next(text) for text in texts.tolist()])

    steps: dict[str, Callable[..., Tensor]] = {EXTEND: run, BEAMS: beams}
    return Runner(
        Group(0, 1), torch.device("cpu"), width, 16, 16, 4, 8, False, True, False, steps
    ), cache


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_search_finds_what_trying_all_texts_finds(penalty: float) -> None:
    prompt, stop, length = [1, 3, 2], 0, 4
    scores = {}
    for size in range(1, length + 1):
        for text in product(range(4), repeat=size):
            if stop in text[:-1] or (size < length and text[-1] != stop):
                continue
            scores[text] = _logprob(prompt, text) / size**penalty
    runner, _ = _table_runner(len(scores) + 1)
    found = find(runner, prompt, Search(len(scores) + 1, penalty, length, frozenset({stop})))
    assert {h.tokens: pytest.approx(h.score, rel=1e-5) for h in found.hypotheses} == scores
    assert found.hypotheses[0].tokens == max(scores, key=scores.__getitem__)


def test_beams_read_the_tokens_of_their_own_texts() -> None:
    """Narrow, long, in several calls for the prompt: many reorderings, each text's score as it is."""
    runner, cache = _table_runner(3)
    prompt = [2, 0, 1, 1, 3, 2, 2, 0, 1]
    found = find(replace(runner, chunk=4), prompt, Search(3, 0.0, 7)).hypotheses
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(_logprob(prompt, hypothesis.tokens), rel=1e-5)
    assert cache[0, :9].tolist() == prompt
    assert (cache[1:, :9] == -99).all()


def test_the_cache_is_not_copied(model: Decoder) -> None:
    """Each step writes each row's one new position, and nothing else."""
    runner = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=WIDTH)
    inner = [module for module in model.modules() if isinstance(module, CachedAttention)]
    caches = [cache for module in inner for cache in (module.k_cache, module.v_cache)]
    addresses = [cache.data_ptr() for cache in caches]
    snapshots: list[list[Tensor]] = []
    sources_seen: list[Tensor] = []

    def step(tokens: Tensor, positions: Tensor, sources: Tensor) -> Tensor:
        snapshots.append([cache.clone() for cache in caches])
        sources_seen.append(sources.clone())
        return runner.steps[BEAMS](tokens, positions, sources)

    watched = replace(runner, steps=runner.steps | {BEAMS: step})
    find(watched, [1, 2, 3], Search(WIDTH, 1.0, COUNT))
    snapshots.append([cache.clone() for cache in caches])
    assert len(snapshots) == COUNT
    for position, (before, after) in enumerate(pairwise(snapshots), start=3):
        for old, new in zip(before, after, strict=True):
            changed = (old != new).any(-1).any(1)  # [W, S]
            assert changed[:, position].all()
            assert int(changed.sum()) == WIDTH
    assert not all(torch.equal(s[:, 3:6], sources_seen[-1][:, 3:6]) for s in sources_seen[3:])
    assert [cache.data_ptr() for cache in caches] == addresses
    modules = [(module.k_cache, module.v_cache) for module in inner]
    assert all(a is b for a, b in zip(caches, sum(modules, ()), strict=True))


def test_compiled_steps_find_the_same_and_compile_nothing_more() -> None:
    config = replace(PRESETS["tiny"], num_layers=1)
    weights = random_checkpoint(expected_shapes(config), seed=1)
    model = load_model(config, weights, Group(0, 1), torch.float32)
    requests = [Request(tuple(range(5, 5 + length)), 6) for length in (1, 2, 9, 40)]
    eager = make_runner(model, Group(0, 1), 64, compiled=False, num_rows=3)
    wanted = [answer.tokens for answer in generate_beams(eager, requests)]
    runner = make_runner(model, Group(0, 1), 64, compiled=True, num_rows=3)
    warm_up(runner, (EXTEND, BEAMS))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [answer.tokens for answer in generate_beams(runner, requests)] == wanted


def test_the_command_searches(run_yoke: RunYoke) -> None:
    words = ["model=tiny", "weights=random", "prompt=abc", "compile=false", "max_new_tokens=6"]
    done = run_yoke(
        "--ranks=2", *words, "num_beams=4", "max_seq_len=32", "dtype=float32", "output=json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    config = PRESETS["tiny"]
    weights = random_checkpoint(expected_shapes(config), seed=0)
    model = load_model(config, weights, Group(0, 1), torch.float32)
    codec = byte_codec(config.vocab_size)
    runner = make_runner(model, Group(0, 1), 32, compiled=False, num_rows=4)
    prompt = tuple(codec.encode("abc", True))
    answer = beam_search(runner, Request(prompt, 6), frozenset(codec.stop_tokens))
    assert report["token_ids"] == list(answer.tokens)
    assert report["finish"] == answer.finish
    assert report["text"] == codec.decode(list(answer.tokens))


@pytest.mark.parametrize(
    "word",
    ["temperature=0.5", "repetition_penalty=1.2", "presence_penalty=0.1", "frequency_penalty=0.1",
     "logit_bias=5:1", "logprobs=0", "draft=lookup", "engine=hf", "stop=."],
)  # fmt: skip
def test_what_does_not_go_with_beams_is_refused(word: str, tmp_path: Path) -> None:
    given = ["model=tiny", "weights=random", "output=json", "num_beams=4"]
    with pytest.raises(InputError, match=rf"num_beams=4 does not go with {word}"):
        job_of([*given, "prompt=x", word])
    job_of([*given[:3], "prompt=x", word])
    key, _, value = word.partition("=")
    if key in ("draft", "engine", "stop"):
        return
    lines = tmp_path / "lines.jsonl"
    own = {"5": 1} if key == "logit_bias" else json.loads(value)
    lines.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "y", key: own}))
    with pytest.raises(InputError, match=rf"line 2: num_beams=4 does not go with {key}="):
        read_prompts(job_of([*given, f"prompts={lines}"]))
    assert len(read_prompts(job_of([*given[:3], f"prompts={lines}"]))) == 2

"""The loop over cache slots against the plain loop with one text at a time: the same tokens, whatever
else is in the batch, and however often the ranks synchronize."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from comm.group import Group
from engine.loop import Watcher, generate
from engine.requests import Answer, Request
from engine.steps import Runner, make_runner
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from models.reference import generate as plain_loop
from models.sampling import Sampling
from weights.formats.random_io import random_checkpoint

CONFIG = PRESETS["tiny"]
GROUP = Group(0, 1)
WARM = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)


@cache
def model() -> Decoder:
    return load_model(CONFIG, random_checkpoint(expected_shapes(CONFIG), 1), GROUP, torch.float32)


def runner(num_rows: int, max_seq_len: int = 200) -> Runner:
    return make_runner(model(), GROUP, max_seq_len, compiled=False, num_rows=num_rows)


def alone(request: Request, stops: frozenset[int] = frozenset()) -> tuple[int, ...]:
    prompt = list(request.prompt)
    return tuple(plain_loop(model(), GROUP, prompt, request.max_new_tokens, stops, request.sampling))


REQUESTS = [
    Request((5, 9, 2), 12),
    Request(tuple(range(40)), 3, WARM),
    Request((7,), 20),
    Request((1, 2, 3, 4, 5), 9, replace(WARM, seed=8)),
    Request(tuple(range(100, 160)), 1),
    Request((8, 8), 15, Sampling(temperature=0.7, seed=11)),
    Request((9,) * 30, 10, Sampling(frequency_penalty=1.5)),
]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8])
@pytest.mark.parametrize("check_every", [1, 8])
def test_every_row_is_as_if_alone(num_rows: int, check_every: int) -> None:
    wanted = [alone(request) for request in REQUESTS]
    answers = generate(runner(num_rows), REQUESTS, check_every=check_every)
    assert [answer.tokens for answer in answers] == wanted
    assert {answer.finish for answer in answers} == {"length"}
    assert all(answer.ttft_s > 0 for answer in answers)


def test_it_is_the_same_with_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs have, and machines without a compiler."""
    wanted = [alone(request) for request in REQUESTS]
    monkeypatch.setattr("kernels.attention.can_attend", lambda device, dtype: False)
    answers = generate(runner(3), REQUESTS)
    assert [answer.tokens for answer in answers] == wanted


def test_stop_tokens_end_their_row_alone_and_are_not_shown() -> None:
    whole = [alone(request) for request in REQUESTS]
    stops = frozenset({whole[0][5], whole[2][0]})
    wanted = [alone(request, stops) for request in REQUESTS]
    assert wanted != whole
    assert wanted[2] == ()
    for num_rows in (1, 3):
        answers = generate(runner(num_rows), REQUESTS, stops)
        assert [answer.tokens for answer in answers] == wanted
        for answer, tokens, all_of_them in zip(answers, wanted, whole, strict=True):
            assert answer.finish == ("length" if len(tokens) == len(all_of_them) else "stop")


def test_a_long_prompt_goes_in_parts() -> None:
    """Longer than a call takes, beside a short one; the kernels see chunks that begin in the middle."""
    requests = [Request(tuple(i % 300 for i in range(1100)), 4), Request((1, 2), 4)]
    answers = generate(runner(2, 1200), requests)
    assert [answer.tokens for answer in answers] == [alone(request) for request in requests]


def test_what_is_in_the_cache_is_not_run_again() -> None:
    engine = runner(1)
    counted: list[int] = []
    step = engine.steps["extend"]

    def watched(where: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        counted.append(where.shape[1])
        return step(where, wanted)

    engine.steps["extend"] = watched
    first = generate(engine, [Request((5, 9, 2, 4, 4, 4), 6)])[0]
    longer = (5, 9, 2, 4, 4, 4, *first.tokens, 77, 78)
    again = generate(engine, [Request(longer, 6, cached=6 + len(first.tokens) - 1)])[0]
    assert again.tokens == alone(Request(longer, 6))
    assert counted == [6, 3]
    # All of it is there: the last token is run for its logits.
    same = generate(engine, [Request((5, 9, 2, 4, 4, 4), 6, cached=6)])[0]
    assert same.tokens == first.tokens


def test_the_watcher_sees_tokens_in_order_and_may_end_a_text() -> None:
    seen: dict[int, list[int]] = {}
    ended: list[tuple[int, Answer]] = []

    def on_token(request: int, token: int) -> bool:
        seen.setdefault(request, []).append(token)
        return request == 2 and len(seen[request]) == 4

    gone: list[set[int]] = [set(), {0}]
    watcher = Watcher(
        on_token, lambda: gone.pop(0) if gone else set(), lambda i, a: ended.append((i, a))
    )
    answers = generate(runner(3), REQUESTS, watcher=watcher, check_every=4)
    assert [tuple(seen[i]) for i in range(len(REQUESTS))] == [answer.tokens for answer in answers]
    assert answers[2].finish == "stop"
    assert answers[2].tokens == alone(REQUESTS[2])[:4]
    assert answers[0].finish == "cancelled"
    assert answers[0].tokens == alone(REQUESTS[0])[: len(answers[0].tokens)]
    assert 0 < len(answers[0].tokens) < 12
    assert sorted(i for i, _ in ended) == list(range(len(REQUESTS)))
    assert dict(ended) == dict(enumerate(answers))


def test_logprobs_are_the_models_own() -> None:
    request = Request((5, 9, 2), 6, Sampling(temperature=1.5, seed=2, logprobs=3))
    answer = generate(runner(2), [request, REQUESTS[2]])[0]
    text = torch.tensor([[*request.prompt, *answer.tokens]])
    model().setup(1, 32)
    logprobs = model().all_logits(text, torch.arange(text.shape[1]))[0].log_softmax(-1)
    for i, (token, found) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        wanted = logprobs[len(request.prompt) + i - 1]
        assert found.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
        assert found.top_logprobs == pytest.approx(wanted.topk(3).values.tolist(), abs=1e-4)
        assert found.top_tokens == tuple(wanted.topk(3).indices.tolist())


@pytest.mark.parametrize(("kv_dtype", "bound"), [("float16", 0.004), ("int8", 0.05)])
def test_a_smaller_cache_changes_logits_little(kv_dtype: str, bound: float) -> None:
    text = torch.randint(0, 500, (2, 60), generator=torch.Generator().manual_seed(0))

    def logits(dtype: torch.dtype | None) -> torch.Tensor:
        model().setup(2, 60, dtype)
        return model().all_logits(text, torch.arange(60))

    with torch.no_grad():
        exact, found = logits(None), logits(getattr(torch, kv_dtype))
    error = float((found - exact).abs().max() / exact.std())
    assert 0 < error < bound

"""What each rank runs for `generate`: load, compile, continue the prompts, report.

The launcher's child process starts it by module name. Only rank 0 reads the tokenizer, prints and
samples.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base.errors import InputError
from base.rank_settings import RankSettings
from base.streams import say, show
from comm import ops
from engine import speculation
from engine.beams import generate_beams
from engine.job import stop_texts
from engine.loop import Watcher, generate
from engine.opening import Opened, joined, open_engine, share, step_names
from engine.prompts import Prompt
from engine.ready import compile_state
from engine.report import (
    Result,
    RunFacts,
    count_bar,
    write_answer,
    write_batch_summary,
    write_json,
    write_summary,
)
from engine.requests import Answer, Request, check_request
from engine.resolve import ResolvedJob, from_json
from engine.texts import Feed, text_stream
from models.chat import apply_chat_template, start_templates
from models.sampling_params import Sampling, check_sampling
from models.tokenizer.codec import TextCodec
from models.tokenizer.limits import check_length


def main(env: RankSettings, payload: str) -> int:
    """Run one generation job on this rank; returns the exit code. Raises InputError, CommError."""
    # Python's own handler would not run while a rank waits in C++, so Ctrl-C would do nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resolved = from_json(payload)
    with joined(env) as group:
        if group.rank == 0 and any(prompt.messages for prompt in resolved.prompts):
            start_templates()
        plain = all(prompt.sampling.is_plain for prompt in resolved.prompts)
        engine = open_engine(env, resolved, group, step_names(resolved.job, plain))
        _run(env, resolved, engine)
    return 0


def _run(env: RankSettings, resolved: ResolvedJob, engine: Opened) -> None:
    requests = share_requests(resolved, engine)
    stops = shared_stops(engine)
    started = time.perf_counter()
    if engine.codec is None:
        run_requests(resolved, engine, requests, stops, Watcher())
        results: list[Result] = []
    elif len(requests) == 1:
        results = [_stream_one(resolved, engine, engine.codec, requests[0], stops)]
    else:
        results = _collect(resolved, engine, engine.codec, requests, stops)
    seconds = time.perf_counter() - started
    peak = torch.tensor([peak_rss_bytes()], device=engine.runner.device)
    peaks = ops.all_gather(peak, engine.group).flatten().tolist()
    if not results:
        return
    facts = RunFacts(
        engine.load_s, engine.ready.compile_s, compile_state(engine.ready, resolved.job.compile), peaks,
        engine.dtype, engine.quant, engine.group.backend, env.plans,
    )  # fmt: skip
    if len(results) > 1:
        write_batch_summary(results, facts, seconds, env.placement)
    elif resolved.job.output == "json":
        write_json(results[0], facts)
    else:
        write_summary(results[0], facts, env.placement)


def share_requests(resolved: ResolvedJob, engine: Opened) -> list[Request]:
    """Tokenize the prompts on rank 0 and share them; returns the requests on every rank. Raises
    InputError for a prompt that does not fit."""
    codec, room, shortened = engine.codec, engine.runner.max_seq_len, 0
    wire = []
    if codec is not None:
        for prompt in resolved.prompts:
            try:
                tokens = encode_prompt(codec, prompt, room)
                check_sampling(prompt.sampling, engine.runner.vocab_size)
            except InputError as error:
                raise InputError(f"{prompt.name}: {error}") from error
            count = prompt.max_new_tokens
            if prompt.shorten and count > room - len(tokens):
                count = max(1, room - len(tokens))
                shortened += 1
            check_request(len(tokens), count, room, prompt.name)
            wire.append([tokens, count, asdict(prompt.sampling)])
        if shortened:
            say(
                f"max_seq_len={room} leaves {shortened} of {len(wire)} answers "
                f"less room than the default max_new_tokens={resolved.job.max_new_tokens}"
            )
    shared = share(wire, engine.group, engine.runner.device)
    return [
        Request(tuple(tokens), count, sampling_from_dict(sampling), name=prompt.name)
        for prompt, (tokens, count, sampling) in zip(resolved.prompts, shared, strict=True)
    ]


def shared_stops(engine: Opened) -> frozenset[int]:
    """Returns the tokens that end an answer, on every rank. Only rank 0's tokenizer knows them."""
    own = sorted(engine.codec.stop_tokens) if engine.codec is not None else []
    return frozenset(share(own, engine.group, engine.runner.device))


def encode_prompt(codec: TextCodec, prompt: Prompt, room: int) -> list[int]:
    """Returns a prompt's tokens. A conversation goes through the model's chat template, a text does
    not. Raises InputError, also for a text that is much too long for `room` tokens."""
    text = apply_chat_template(codec, prompt.messages) if prompt.messages else prompt.text
    check_length(len(text), codec.longest, room)
    return codec.encode(text, not prompt.messages)


def sampling_from_dict(data: dict[str, Any]) -> Sampling:
    """The inverse of `asdict`, for data that went through JSON."""
    bias = tuple((token, value) for token, value in data["logit_bias"])
    return Sampling(**data | {"logit_bias": bias})


def run_requests(
    resolved: ResolvedJob,
    engine: Opened,
    requests: Sequence[Request],
    stops: frozenset[int],
    watcher: Watcher,
) -> list[Answer]:
    """Returns the answers, decoded as the job asks: beam search, speculative decoding or the plain
    loop."""
    job = resolved.job
    if job.num_beams > 1:
        return generate_beams(engine.runner, requests, stops, job.length_penalty, watcher)
    if job.draft:
        return speculation.generate(
            engine.runner, requests, stops, watcher, engine.draft, job.draft_tokens
        )
    return generate(engine.runner, requests, stops, watcher, job.check_every)


def _stream_one(
    resolved: ResolvedJob, engine: Opened, codec: TextCodec, request: Request, stops: frozenset[int]
) -> Result:
    """Run one request; its text is streamed to stdout unless the output is JSON."""
    feed = text_stream(codec, stop_texts(resolved.job))
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        if text and resolved.job.output == "text":
            show(text, end="")

    def on_token(_: int, token: int) -> bool:
        text, ended = feed(token)
        take(text)
        return ended

    answers = run_requests(resolved, engine, [request], stops, Watcher(on_token))
    take(feed(None)[0])  # held-back text: an unfinished character, or the start of a stop string
    return _result(answers[0], "".join(pieces), request, resolved.prompts[0])


def _collect(
    resolved: ResolvedJob,
    engine: Opened,
    codec: TextCodec,
    requests: Sequence[Request],
    stops: frozenset[int],
) -> list[Result]:
    """Run many requests; each answer is written when it and all answers before it are complete."""
    texts = stop_texts(resolved.job)
    feeds: dict[int, Feed] = {}
    pieces: dict[int, list[str]] = {}
    results: dict[int, Result] = {}
    written = 0

    def on_token(index: int, token: int) -> bool:
        feed = feeds.setdefault(index, text_stream(codec, texts))
        text, ended = feed(token)
        pieces.setdefault(index, []).append(text)
        return ended

    with ExitStack() as stack:
        progress = stack.enter_context(count_bar("prompts", len(requests)))

        def on_end(index: int, answer: Answer) -> None:
            nonlocal written
            rest = feeds[index](None)[0] if index in feeds else ""
            text = "".join([*pieces.pop(index, []), rest])
            results[index] = _result(answer, text, requests[index], resolved.prompts[index])
            progress(len(results))
            while written in results:
                write_answer(written, results[written], resolved.prompts[written], resolved.job.output)
                written += 1

        run_requests(resolved, engine, requests, stops, Watcher(on_token, on_end=on_end))
    return [results[i] for i in range(len(requests))]


def _result(answer: Answer, text: str, request: Request, prompt: Prompt) -> Result:
    return Result(
        text=text,
        finish=answer.finish,
        prompt_tokens=len(request.prompt),
        tokens=len(answer.tokens),
        token_ids=list(answer.tokens),
        ttft_s=answer.ttft_s,
        tpot_s=answer.tpot_s,
        drafted=answer.drafted,
        accepted=answer.accepted,
        logprobs=[asdict(logprobs) for logprobs in answer.logprobs],
        id=prompt.id,
    )


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process, in bytes. Not ru_maxrss, which starts at the
    memory of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

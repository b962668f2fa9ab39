"""What each rank runs for `chat`: one conversation after another, over a channel to the terminal.

Rank 0 reads requests from the channel, one JSON object on each line (`launcher.chat.console` has the
protocol), and broadcasts them to the other ranks. While there is no request, all ranks synchronize many
times a second, so that a wait for a person never looks like a rank that hangs. The keys of earlier
turns stay in the cache: when a conversation continues, only its new tokens are run.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from base.errors import InputError
from base.rank_settings import RankSettings
from comm import ops
from engine.generate import encode_prompt, run_requests, shared_stops
from engine.job import Job, sampling_of, stop_texts
from engine.loop import Watcher
from engine.opening import Opened, compile_more, joined, open_engine, share, step_names
from engine.prompts import Prompt
from engine.requests import Answer, Request
from engine.resolve import ResolvedJob, from_json
from engine.settings import changed_job, settings_of
from engine.texts import text_stream
from models.chat import start_templates
from models.sampling_params import check_sampling
from models.tokenizer.codec import TextCodec

IDLE_S = 0.04  # between two synchronizations of idle ranks; delays a first token by at most this


def main(env: RankSettings, payload: str) -> int:
    """Serve conversations until the channel ends; returns the exit code. Raises InputError,
    CommError."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resolved = from_json(payload)
    with joined(env) as group:
        if group.rank == 0:
            start_templates()
        sampling = sampling_of(resolved.job)
        names = step_names(resolved.job, sampling.is_plain)
        engine = open_engine(env, resolved, group, names)
        check_sampling(sampling, engine.runner.vocab_size)
        channel = None
        if engine.codec is not None:
            assert env.channel_fd is not None  # rank 0 of `chat` has one
            channel = channel_of(env.channel_fd)
        if channel is not None:
            send(channel, {"ready": _facts(env, resolved, engine)})
        _serve(env, resolved, engine, names, channel)
    return 0


@dataclass(frozen=True)
class Channel:
    """Rank 0's end of the channel. `rest`: bytes of an unfinished line. `messages`: received and not
    yet handled; None is the channel's end. `unsent`: bytes that are not written yet: a terminal process
    that is stopped does not read, and rank 0 must not block, or the other ranks would run into a
    deadline."""

    socket: socket.socket
    rest: bytearray
    messages: deque[dict[str, Any] | None]
    unsent: bytearray


def channel_of(fd: int) -> Channel:
    """Returns the channel of a file descriptor, set to non-blocking."""
    end = socket.socket(fileno=fd)
    end.setblocking(False)
    return Channel(end, bytearray(), deque(), bytearray())


def send(channel: Channel, message: dict[str, Any]) -> None:
    """Write one message, or as much of it as the socket takes now; the rest stays in `unsent`."""
    channel.unsent.extend(json.dumps(message, ensure_ascii=False).encode() + b"\n")
    _flush(channel)


def _flush(channel: Channel) -> None:
    try:
        while channel.unsent:
            del channel.unsent[: channel.socket.send(channel.unsent)]
    except BlockingIOError:
        pass
    except (BrokenPipeError, ConnectionResetError):
        channel.unsent.clear()  # the other end is closed; `receive` reports it


def receive(channel: Channel, wait_s: float) -> None:
    """Read all messages that have come into `channel.messages`, after waiting up to `wait_s` seconds
    for the first."""
    _flush(channel)
    while select.select([channel.socket], [], [], wait_s)[0]:
        try:
            data = channel.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            channel.messages.append(None)
            return
        channel.rest.extend(data)
        *lines, rest = channel.rest.split(b"\n")
        channel.rest[:] = rest
        channel.messages.extend(json.loads(line) for line in lines)
        wait_s = 0.0


def _serve(
    env: RankSettings,
    resolved: ResolvedJob,
    engine: Opened,
    names: Sequence[str],
    channel: Channel | None,
) -> None:
    """`names`: the steps that are compiled."""
    kept: tuple[int, ...] = ()  # the tokens whose keys are in the cache
    stops = shared_stops(engine)
    while True:
        task: dict[str, Any] | None = None
        if channel is not None and engine.codec is not None:
            limits = engine.runner.max_seq_len, engine.runner.vocab_size
            task = next_task(resolved, engine.codec, channel, kept, *limits)
        task = _meet(task, engine)
        if task is None:
            continue
        if task["id"] is None:
            return
        if "set" in task:
            limits = engine.runner.max_seq_len, engine.runner.vocab_size
            resolved = replace(resolved, job=changed_job(resolved.job, task["set"], *limits))
            wanted = step_names(resolved.job, sampling_of(resolved.job).is_plain)
            if lacking := [name for name in wanted if name not in names]:
                engine = compile_more(env, resolved.job, engine, lacking)
                names, kept = (*names, *lacking), ()  # compiling wrote into the cache
            if channel is not None:
                send(channel, {"id": task["id"], "settings": settings_of(resolved.job)})
            continue
        request = Request(
            tuple(task["tokens"]), task["max_new_tokens"], sampling_of(resolved.job), task["cached"],
            "the conversation",
        )  # fmt: skip
        if channel is None or engine.codec is None:
            answer = run_requests(resolved, engine, [request], stops, Watcher())[0]
        else:
            answer = _answer(resolved, engine, engine.codec, channel, request, task["id"], stops)
        made = share(
            answer.tokens[:-1], engine.group, engine.runner.device
        )  # the last one was never fed
        kept = request.prompt + tuple(made)


def _meet(task: dict[str, Any] | None, engine: Opened) -> dict[str, Any] | None:
    """Broadcast rank 0's task to every rank. If there is none, returns None after a pause."""
    group = engine.group
    if group.rank and group.size > 1:
        there = torch.zeros(1, dtype=torch.int64, device=engine.runner.device)
    else:
        there = torch.tensor([int(task is not None)], device=engine.runner.device)
    if int(ops.broadcast(there, 0, group)):
        found: dict[str, Any] = share(task, group, engine.runner.device)
        return found
    for runner in engine.ready.runners:
        runner.check()
    if group.rank:
        time.sleep(
            IDLE_S * 0.9
        )  # rank 0 reads the channel meanwhile; waiting in a collective would spin
    return None


def next_task(
    resolved: ResolvedJob,
    codec: TextCodec,
    channel: Channel,
    kept: tuple[int, ...],
    max_seq_len: int,
    vocab_size: int,
) -> dict[str, Any] | None:
    """Returns the next task for all ranks: a tokenized request; settings; {"id": None} to end; None if
    there is none. What cannot be done is reported over the channel."""
    if not channel.messages:
        receive(channel, IDLE_S)
    if not channel.messages:
        return None
    message = channel.messages.popleft()
    if message is None:
        return {"id": None}
    if "id" not in message:
        return None  # a cancel message for an answer that has already ended
    number = message["id"]
    try:
        if "set" in message:
            changed_job(resolved.job, message["set"], max_seq_len, vocab_size)
            return {"id": number, "set": message["set"]}
        prompt, most = asked_of(resolved, codec, message["messages"])
        tokens = encode_prompt(codec, prompt, max_seq_len)
        room = max_seq_len - len(tokens)
        if room < 1:
            raise InputError(
                f"the conversation has {len(tokens)} tokens, so max_seq_len={max_seq_len} leaves no "
                "room for an answer; begin anew with /reset, or use a larger max_seq_len="
            )
    except InputError as error:
        send(channel, {"id": number, "error": str(error)})
        return None
    pairs = enumerate(zip(kept, tokens, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(kept), len(tokens)))
    return {
        "id": number,
        "tokens": tokens,
        "max_new_tokens": min(room, most),
        # A draft model's cache may lack tokens of the earlier turns.
        "cached": 0 if resolved.draft is not None else same,
    }


def asked_of(
    resolved: ResolvedJob, codec: TextCodec, messages: Sequence[dict[str, str]]
) -> tuple[Prompt, int]:
    """The prompt of a conversation, and the length of its answer at most. A model without a chat
    template continues the last message alone: nothing says where its text would end, so its length is
    that of `generate`."""
    job = resolved.job
    sampling = sampling_of(job)
    if codec.chat_templates:
        return Prompt("", job.max_new_tokens, sampling, tuple(messages)), job.max_new_tokens
    most = job.max_new_tokens if "max_new_tokens" in job.given else Job.max_new_tokens
    return Prompt(messages[-1]["content"], most, sampling), most


def _answer(
    resolved: ResolvedJob,
    engine: Opened,
    codec: TextCodec,
    channel: Channel,
    request: Request,
    number: int,
    stops: frozenset[int],
) -> Answer:
    """Run one request on rank 0, and stream its text over the channel."""
    feed = text_stream(codec, stop_texts(resolved.job))
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        if text:
            send(channel, {"id": number, "text": text})

    def on_token(_: int, token: int) -> bool:
        text, ended = feed(token)
        show(text)
        return ended

    def cancelled() -> set[int]:
        receive(channel, 0.0)
        gone = None in channel.messages or {"cancel": number} in channel.messages
        return {0} if gone else set()

    answer = run_requests(resolved, engine, [request], stops, Watcher(on_token, cancelled))[0]
    show(feed(None)[0])
    figures = {
        "finish": answer.finish,
        "prompt_tokens": len(request.prompt),
        "cached_tokens": request.cached,
        "tokens": len(answer.tokens),
        "ttft_s": answer.ttft_s,
        "tpot_s": answer.tpot_s,
        "text": "".join(pieces),
    }
    send(channel, {"id": number, "done": figures})
    return answer


def _facts(env: RankSettings, resolved: ResolvedJob, engine: Opened) -> dict[str, Any]:
    return {
        "model": resolved.job.model,
        "max_seq_len": engine.runner.max_seq_len,
        "continues": engine.codec is not None and not engine.codec.chat_templates,
        "dtype": engine.dtype,
        "quant": engine.quant,
        "comm": engine.group.backend,
        "ranks": engine.group.size,
        "placement": env.placement,
        "load_s": round(engine.load_s, 1),
        "compile_s": round(engine.ready.compile_s, 1),
    }

"""Yoke's side of bench/peers.py: an engine in every rank that waits for requests for samples.

Rank 0 receives a request on its channel, a line `{"sample": n}`, and answers with times and tokens.
Between requests the ranks synchronize periodically, as for `chat`, and sleep in between.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm import ops
from engine.chat import Channel, channel_of, receive, send
from engine.loop import generate
from engine.opening import Opened, joined, open_engine, share
from engine.requests import Request
from engine.resolve import from_json
from engine.steps import EXTEND, GREEDY

IDLE_S = 0.1  # a broadcast takes microseconds and does not disturb the other program
TEXT = Path(__file__).resolve().parent.parent / "docs" / "ARCHITECTURE.md"


def main(env: RankSettings, payload: str) -> int:
    """Take samples until the channel is closed; returns the exit code."""
    task = json.loads(payload)
    resolved = from_json(task["resolved"])
    with joined(env) as group:
        engine = open_engine(env, resolved, group, (EXTEND, GREEDY))
        found: list[int] = []
        if engine.codec is not None:
            found = engine.codec.encode(TEXT.read_text(), True)
            found = (found * (task["prompt"] // len(found) + 1))[: task["prompt"]]
        prompt = tuple(share(found, group, engine.runner.device))
        channel = None
        if env.channel_fd is not None:  # rank 0's
            channel = channel_of(env.channel_fd)
            facts = {"dtype": engine.dtype, "comm": group.backend, "ranks": group.size}
            send(channel, {"ready": facts | {"placement": env.placement}, "prompt": prompt})
        waited = time.process_time()
        while True:
            asked = meet(engine, channel)
            if asked == _END:
                return 0
            if asked == _SAMPLE:
                idle = time.process_time() - waited
                answer = generate(engine.runner, [Request(prompt, resolved.job.max_new_tokens)])[0]
                if channel is not None:
                    times = {"ttft_s": answer.ttft_s, "tpot_s": answer.tpot_s}
                    send(channel, times | {"tokens": answer.tokens, "idle_cpu_s": idle})
                waited = time.process_time()


_NOTHING, _SAMPLE, _END = range(3)


def meet(engine: Opened, channel: Channel | None) -> int:
    """The request that rank 0 has received, on every rank: _NOTHING, _SAMPLE or _END."""
    asked = _NOTHING
    if channel is not None:
        if not channel.messages:
            receive(channel, IDLE_S)
        if channel.messages:
            asked = _SAMPLE if channel.messages.popleft() is not None else _END
    elif engine.group.rank:
        time.sleep(IDLE_S * 0.9)  # waiting in the collective would spin
    return int(ops.broadcast(torch.tensor([asked]), 0, engine.group))

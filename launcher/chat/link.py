"""The chat's end of the channel to rank 0 (`launcher.chat.console` describes the protocol)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from dataclasses import dataclass, fields
from typing import Any

Message = dict[str, Any]


class EndedError(Exception):
    """Rank 0 has ended; the launcher prints why."""


class InterruptedByKeyError(Exception):
    """Ctrl-C while waiting; no message of rank 0 is lost."""


@dataclass
class Link:
    """The channel to rank 0; `wakeup` yields the numbers of signals (see `signal.set_wakeup_fd`)."""

    channel: socket.socket
    wakeup: int
    pending: bytes = b""


@dataclass(frozen=True)
class Done:
    """The end of an answer. Times are in seconds; `cached_tokens` prompt tokens came from the cache."""

    finish: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    ttft_s: float
    tpot_s: float
    text: str


def read_done(message: Message) -> Done:
    """`Done` from a message of rank 0; unknown keys are ignored."""
    return Done(**{field.name: message[field.name] for field in fields(Done)})


def send(link: Link, message: Message) -> None:
    """Send one message. Raises EndedError."""
    try:
        link.channel.sendall(json.dumps(message, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise EndedError from error


def receive(link: Link) -> Message:
    """The next message. Raises EndedError, and InterruptedByKeyError for a Ctrl-C."""
    while b"\n" not in link.pending:
        ready, _, _ = select.select([link.channel.fileno(), link.wakeup], [], [])
        if link.wakeup in ready and take_interrupts(link):
            raise InterruptedByKeyError
        if link.channel.fileno() in ready:
            try:
                chunk = link.channel.recv(1 << 16)
            except OSError as error:
                raise EndedError from error
            if not chunk:
                raise EndedError
            link.pending += chunk
    line, _, link.pending = link.pending.partition(b"\n")
    message: Message = json.loads(line)
    return message


def take_interrupts(link: Link) -> bool:
    """Discard the signals that have arrived; return whether one was a Ctrl-C."""
    try:
        return signal.SIGINT in os.read(link.wakeup, 4096)
    except BlockingIOError:
        return False

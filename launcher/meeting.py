"""Ranks of one machine that a manager started meet, and agree on what the manager does not say.

A random session token, and a free port for the rendezvous where none was named. Variables can be left
over from a run that has ended, so whoever waits soon says for whom, and by which variables. Not here:
ranks of other machines, which meet at the port that their manager named.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from base.errors import LaunchError
from base.streams import say
from launcher.manager import Managed
from launcher.user_secret import user_secret

_PATIENCE_S = 5.0  # from the start of a wait to a word on it
_TURN_S = 0.5  # between two looks at the clock
_TOKEN = 16  # characters of a session token
_ANSWER = f"<I{_TOKEN}s"  # the port and the token

Turn = Callable[[str], float]


def _turns(place: Managed, deadline_s: float) -> Turn:
    """A function to call again and again while waiting, with what is missing: it returns how long to
    wait now, in seconds, says once and before long what the wait is for, and raises LaunchError when
    `deadline_s` is over."""
    start = time.monotonic()
    said = False

    def turn(missing: str) -> float:
        nonlocal said
        waited = time.monotonic() - start
        if waited >= deadline_s:
            raise LaunchError(f"{missing} within {deadline_s:g} s; {place.claim}")
        if waited >= _PATIENCE_S and not said:
            said = True
            say(f"waiting: {missing} yet; {place.claim}")
        return min(deadline_s - waited, _TURN_S if said else max(_PATIENCE_S - waited, 0.01))

    return turn


@dataclass(frozen=True)
class Meeting:
    """What the ranks of one machine have agreed on: the run's random token on this machine, the port of
    the rendezvous and, on rank 0 of ranks whose manager named none, a socket that listens on it."""

    session: str
    port: int
    store: socket.socket | None = None


def meet(place: Managed, deadline_s: float) -> Meeting:
    """Agree with the other ranks of this machine.

    They wait for each other through a socket in the kernel's abstract namespace, which leaves no file;
    the first of them tells the others. Ranks on several machines meet later, at the port that the
    manager named. Raises LaunchError that names who does not come in time.
    """
    turn = _turns(place, deadline_s)
    if place.world_size > 1 and (place.agent_store or not place.is_on_one_machine):
        _expect_store(place)
    if place.place_here:
        return _ask(place, turn)
    store, port = None, place.master_port
    if place.world_size > 1 and not port:
        store = socket.create_server(("127.0.0.1", 0), backlog=place.world_size)
        port = store.getsockname()[1]
    meeting = Meeting(secrets.token_hex(_TOKEN // 2), port, store)
    try:
        if place.local_world_size > 1:
            _tell(place, turn, meeting)
    except BaseException:
        if store is not None:
            store.close()
        raise
    return meeting


def _door(place: Managed) -> str:
    """The socket's name, which no other user can know before it is there, and take."""
    name = hashlib.sha256(user_secret() + place.run.encode()).hexdigest()[:32]
    return f"\0yoke-{name}-{place.node}"


def _tell(place: Managed, turn: Turn, meeting: Meeting) -> None:
    answer = struct.pack(_ANSWER, meeting.port, meeting.session.encode())
    missing = set(range(1, place.local_world_size))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        try:
            door.bind(_door(place))
        except OSError as error:
            raise LaunchError(
                f"{_holder(place)} is {place.rank_here} 0 of this run already ({error.strerror}); "
                f"{place.claim}"
            ) from None
        door.listen(place.local_world_size)
        while missing:
            names = ", ".join(map(str, sorted(missing)))
            door.settimeout(
                turn(
                    f"{len(missing)} of {place.local_world_size} ranks did not come "
                    f"({place.rank_here} {names})"
                )
            )
            with suppress(OSError):
                peer, _ = door.accept()
                with peer:
                    peer.settimeout(_TURN_S)
                    if _uid(peer) == os.getuid() and len(data := peer.recv(4)) == 4:
                        peer.sendall(answer)
                        missing.discard(struct.unpack("<I", data)[0])


def _ask(place: Managed, turn: Turn) -> Meeting:
    who = place.rank_here
    while True:
        seconds = turn(f"{who} 0 did not answer {who} {place.place_here}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line, suppress(OSError):
            line.settimeout(seconds)
            line.connect(_door(place))
            if _uid(line) == os.getuid():
                line.sendall(struct.pack("<I", place.place_here))
                data = line.recv(struct.calcsize(_ANSWER))
                if len(data) == struct.calcsize(_ANSWER):
                    port, token = struct.unpack(_ANSWER, data)
                    return Meeting(token.decode(), port)
        time.sleep(0.02)


def _holder(place: Managed) -> str:
    """Who has bound the socket, for a message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line, suppress(OSError):
        line.settimeout(_TURN_S)
        line.connect(_door(place))
        if _uid(line) != os.getuid():
            return f"a process of user {_uid(line)}"
    return "another process"


def _expect_store(place: Managed) -> None:
    """Say so if nobody listens where other ranks than 0 are to meet it."""
    if place.rank == 0 and not place.agent_store:
        return
    where = f"{place.master_addr}:{place.master_port} (MASTER_ADDR, MASTER_PORT)"
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        try:
            socket.create_connection((place.master_addr, place.master_port), _PATIENCE_S).close()
            return
        except OSError as error:
            # The agent serves its store before it starts a rank: if it is not there, it is gone.
            if place.agent_store and isinstance(error, ConnectionRefusedError):
                raise LaunchError(
                    f"nobody listens at {where}, where torchrun's agent would; {place.claim}"
                ) from None
        time.sleep(0.05)
    say(f"waiting: nobody listens at {where} yet; {place.claim}")


def _uid(line: socket.socket) -> int:
    """Whose process is at the other end."""
    _, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)

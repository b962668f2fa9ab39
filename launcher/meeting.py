"""Let the ranks that a manager started on one machine agree on what the manager does not set.

These are a random session token and, if no port was given, a free port for the rendezvous. Variables
can be left over from a run that has ended. So a rank that waits for more than a few seconds prints
which ranks it waits for, and which variables say that they exist. Not here: ranks on other machines,
which meet at the port that their manager gave.
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

_PATIENCE_S = 5.0  # from the start of a wait to the message about it
_POLL_S = 0.5  # longest wait between two checks of the clock
_TOKEN = 16  # characters of a session token
_ANSWER = f"<I{_TOKEN}s"  # the port and the token

NextTimeout = Callable[[str], float]


def _start_wait(place: Managed, deadline_s: float) -> NextTimeout:
    """A function to call repeatedly while waiting, with a text on what is missing. It returns how long
    to wait next, in seconds. After a few seconds it prints once what the wait is for. It raises
    LaunchError after `deadline_s` seconds."""
    start = time.monotonic()
    said = False

    def next_timeout(missing: str) -> float:
        nonlocal said
        waited = time.monotonic() - start
        if waited >= deadline_s:
            raise LaunchError(f"{missing} within {deadline_s:g} s; {place.claim}")
        if waited >= _PATIENCE_S and not said:
            said = True
            say(f"waiting: {missing} yet; {place.claim}")
        return min(deadline_s - waited, _POLL_S if said else max(_PATIENCE_S - waited, 0.01))

    return next_timeout


@dataclass(frozen=True)
class Meeting:
    """What the ranks of one machine have agreed on: the run's random token on this machine and the port
    of the rendezvous. `store`: a socket that listens on it, on rank 0 if the manager gave no port."""

    session: str
    port: int
    store: socket.socket | None = None


def meet(place: Managed, deadline_s: float) -> Meeting:
    """Wait for the other ranks of this machine and agree with them.

    They meet at a socket in the kernel's abstract namespace, which leaves no file. The first rank of
    the machine sends token and port to the others. Ranks on other machines meet later, at the port that
    the manager gave. Raises LaunchError that names the ranks still missing after `deadline_s` seconds.
    """
    next_timeout = _start_wait(place, deadline_s)
    if place.world_size > 1 and (place.agent_store or not place.is_on_one_machine):
        _expect_store(place)
    if place.place_here:
        return _ask_first_rank(place, next_timeout)
    store, port = None, place.master_port
    if place.world_size > 1 and not port:
        store = socket.create_server(("127.0.0.1", 0), backlog=place.world_size)
        port = store.getsockname()[1]
    meeting = Meeting(secrets.token_hex(_TOKEN // 2), port, store)
    try:
        if place.local_world_size > 1:
            _answer_ranks(place, next_timeout, meeting)
    except BaseException:
        if store is not None:
            store.close()
        raise
    return meeting


def _socket_name(place: Managed) -> str:
    """The name of the socket. Other users cannot compute it, so they cannot bind it first."""
    name = hashlib.sha256(user_secret() + place.run.encode()).hexdigest()[:32]
    return f"\0yoke-{name}-{place.node}"


def _answer_ranks(place: Managed, next_timeout: NextTimeout, meeting: Meeting) -> None:
    answer = struct.pack(_ANSWER, meeting.port, meeting.session.encode())
    missing = set(range(1, place.local_world_size))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(_socket_name(place))
        except OSError as error:
            raise LaunchError(
                f"{_holder(place)} already runs as {place.rank_here} 0 of this run ({error.strerror}); "
                f"{place.claim}"
            ) from None
        listener.listen(place.local_world_size)
        while missing:
            names = ", ".join(map(str, sorted(missing)))
            listener.settimeout(
                next_timeout(
                    f"{len(missing)} of {place.local_world_size} ranks did not connect "
                    f"({place.rank_here} {names})"
                )
            )
            with suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(_POLL_S)
                    if _uid(peer) == os.getuid() and len(data := peer.recv(4)) == 4:
                        peer.sendall(answer)
                        missing.discard(struct.unpack("<I", data)[0])


def _ask_first_rank(place: Managed, next_timeout: NextTimeout) -> Meeting:
    who = place.rank_here
    while True:
        seconds = next_timeout(f"{who} 0 did not answer {who} {place.place_here}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, suppress(OSError):
            connection.settimeout(seconds)
            connection.connect(_socket_name(place))
            if _uid(connection) == os.getuid():
                connection.sendall(struct.pack("<I", place.place_here))
                data = connection.recv(struct.calcsize(_ANSWER))
                if len(data) == struct.calcsize(_ANSWER):
                    port, token = struct.unpack(_ANSWER, data)
                    return Meeting(token.decode(), port)
        time.sleep(0.02)


def _holder(place: Managed) -> str:
    """For a message: who has bound the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, suppress(OSError):
        connection.settimeout(_POLL_S)
        connection.connect(_socket_name(place))
        if _uid(connection) != os.getuid():
            return f"a process of user {_uid(connection)}"
    return "another process"


def _expect_store(place: Managed) -> None:
    """Print a message if nothing listens at the master address, where ranks other than 0 connect.
    Raises LaunchError if that is torchrun's agent, which has then ended."""
    if place.rank == 0 and not place.agent_store:
        return
    where = f"{place.master_addr}:{place.master_port} (MASTER_ADDR, MASTER_PORT)"
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        try:
            socket.create_connection((place.master_addr, place.master_port), _PATIENCE_S).close()
            return
        except OSError as error:
            # The agent serves its store before it starts ranks: if nothing listens, it has ended.
            if place.agent_store and isinstance(error, ConnectionRefusedError):
                raise LaunchError(
                    f"nothing listens at {where}, where torchrun's agent should; {place.claim}"
                ) from None
        time.sleep(0.05)
    say(f"waiting: nothing listens at {where} yet; {place.claim}")


def _uid(connection: socket.socket) -> int:
    """The user id of the process at the other end."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)

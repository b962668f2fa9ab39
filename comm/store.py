"""A store with signed values: ranks find each other through it, and nobody else can redirect them.

torch's TCPStore trusts everybody who reaches its port: a stranger can list its keys and overwrite them,
and gloo connects to the addresses that it reads there. So every value is signed with a key that only
this run's ranks know. They derive it from a secret and one random number (nonce) per rank. Thus values
that another run signed are invalid in this run, and whoever changes a nonce only makes the ranks'
keys differ. The names of store keys are hashed with the key, too.

A `SignedStore` is a class because torch's process groups take a store object.

What is not here: encryption, and protection against somebody who reaches the port and stops a run
(keys can be removed, counters changed). The port belongs in a private network: docs/security.md.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from comm.errors import CommError

_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size


def agree_on_key(store: Any, rank: int, size: int, secret: bytes) -> bytes:
    """The key of this run (32 bytes), the same on all ranks that pass the same `secret`.

    Raises CommError if a rank derives another key: its secret differs, or somebody else has changed
    values in the store.
    """
    own = secrets.token_bytes(_NONCE_BYTES)
    store.set(f"hello/{rank}", own)
    nonces = [store.get(f"hello/{each}") for each in range(size)]
    if nonces[rank] != own or any(len(nonce) != _NONCE_BYTES for nonce in nonces):
        raise CommError(
            f"rank {rank}: somebody else writes to this run's store: the nonces in it are not what "
            "ranks wrote; run in a private network (docs/security.md)"
        )
    key = _mac(secret, size.to_bytes(4, "little") + b"".join(nonces))
    store.set(f"proof/{rank}", _mac(key, f"proof/{rank}".encode()))
    for each in range(size):
        if not hmac.compare_digest(store.get(f"proof/{each}"), _mac(key, f"proof/{each}".encode())):
            raise CommError(
                f"rank {rank}: rank {each} does not have this run's secret, or somebody else writes to "
                "this run's store; every machine needs the same --secret-file (or YOKE_SECRET)"
            )
    return key


class SignedStore(dist.Store):  # type: ignore
    """`inner` with hashed names and signed values. Reading a value that no rank of this run signed for
    that name raises CommError. Counters (`add`) are not signed: they hold no addresses."""

    def __init__(self, inner: Any, key: bytes) -> None:
        super().__init__()
        self._inner = inner
        self._key = key

    def _name(self, key: str) -> str:
        return _mac(self._key, b"name/" + key.encode()).hex()

    def _sign(self, key: str, value: bytes) -> bytes:
        return _mac(self._key, b"value/" + self._name(key).encode() + value) + value

    def _open(self, key: str, signed: bytes) -> bytes:
        value = signed[_MAC_BYTES:]
        if not hmac.compare_digest(self._sign(key, value), signed):
            raise CommError(
                f"somebody else writes to this run's store: {key} is not signed by a rank of this run; "
                "run in a private network (docs/security.md)"
            )
        return value

    def set(self, key: str, value: str | bytes) -> None:
        self._inner.set(self._name(key), self._sign(key, _as_bytes(value)))

    def get(self, key: str) -> bytes:
        return self._open(key, self._inner.get(self._name(key)))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        old = self._sign(key, _as_bytes(expected)) if expected else b""
        return self._open(
            key, self._inner.compare_set(self._name(key), old, self._sign(key, _as_bytes(desired)))
        )

    def add(self, key: str, amount: int) -> int:
        return int(self._inner.add(self._name(key), amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self._inner.check([self._name(key) for key in keys]))

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        limit = self._inner.timeout if timeout is None else timeout
        self._inner.wait([self._name(key) for key in keys], limit)

    def delete_key(self, key: str) -> bool:
        return bool(self._inner.delete_key(self._name(key)))

    def num_keys(self) -> int:
        return int(self._inner.num_keys())

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._inner.set_timeout(timeout)


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def listen_at(address: str, port: int, say: Callable[[str], None]) -> int:
    """The file descriptor of a socket that listens at `address`, the rendezvous address of rank 0.

    It listens at this address alone. If the address is not this machine's (it may be translated on the
    way), it listens at all addresses and calls `say` with a warning. Raises CommError.
    """
    failed: OSError | None = None
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CommError(
            f"the rendezvous address {address}:{port} cannot be resolved: {error}"
        ) from error
    for family, _, _, _, place in found:
        try:
            return socket.create_server(place[:2], family=family, backlog=1024).detach()
        except OSError as error:
            failed = error
    if failed is None or failed.errno != errno.EADDRNOTAVAIL:
        raise CommError(
            f"rank 0 cannot listen at {address}:{port}: {failed}; choose another address or port"
        ) from failed
    say(f"{address} is no address of this machine: the rendezvous listens at all its addresses")
    return socket.create_server(("", port), backlog=1024).detach()

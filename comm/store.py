"""The store in which ranks find each other, such that nobody else can tell them where to go.

torch's TCPStore believes whoever reaches its port: it lists keys, and has them written anew. What gloo
finds there are the addresses that it connects to. So on top of it, every value is signed, by a key that
this run's ranks alone know. They make it from a secret, and from a random number of each rank: what
another run has signed is worth nothing in this one, and who changes a number gains a key that no two
ranks share. The names of keys are mixed with it too.

A `SignedStore` is a class because torch's process groups take a store as one.

What is not here: hiding what is said, and keeping somebody who reaches the port from stopping a run
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
    """The key of this run, which all ranks that have the same `secret` come to. Raises CommError if
    a rank comes to another one: its secret differs, or somebody has changed what ranks said."""
    own = secrets.token_bytes(_NONCE_BYTES)
    store.set(f"hello/{rank}", own)
    told = [store.get(f"hello/{each}") for each in range(size)]
    if told[rank] != own or any(len(nonce) != _NONCE_BYTES for nonce in told):
        raise CommError(f"rank {rank}: somebody else writes to this run's store")
    key = _mac(secret, size.to_bytes(4, "little") + b"".join(told))
    store.set(f"proof/{rank}", _mac(key, f"proof/{rank}".encode()))
    for each in range(size):
        if not hmac.compare_digest(store.get(f"proof/{each}"), _mac(key, f"proof/{each}".encode())):
            raise CommError(
                f"rank {rank}: rank {each} does not have this run's secret, or somebody else writes to "
                "this run's store; every machine needs the same --secret-file (or YOKE_SECRET)"
            )
    return key


class SignedStore(dist.Store):  # type: ignore
    """`inner` with mixed names and signed values. Reading a value that no rank of this run has signed
    for that name raises CommError. Counters (`add`) are not signed: they say when, and never where."""

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
            raise CommError(f"somebody else writes to this run's store: {key} is not what a rank wrote")
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
    """A socket that listens at this address alone, where others are told to find rank 0. Where the
    address is not one of this machine's (it may be translated on the way), at all, which is said.
    Raises CommError."""
    failed: OSError | None = None
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CommError(f"the rendezvous {address}:{port} has no address: {error}") from error
    for family, _, _, _, place in found:
        try:
            return socket.create_server(place[:2], family=family, backlog=1024).detach()
        except OSError as error:
            failed = error
    if failed is None or failed.errno != errno.EADDRNOTAVAIL:
        raise CommError(f"rank 0 cannot listen at {address}:{port}: {failed}") from failed
    say(f"{address} is no address of this machine: the rendezvous listens at all of them")
    return socket.create_server(("", port), backlog=1024).detach()

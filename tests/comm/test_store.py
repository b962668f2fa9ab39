"""The values that ranks exchange to meet: if somebody else changes one, the ranks notice."""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from comm.errors import CommError
from comm.store import SignedStore, agree_on_key, listen_at

TIMEOUT = datetime.timedelta(seconds=10)


@pytest.fixture
def connect() -> Callable[[], Any]:
    """Clients of one TCPStore, as ranks and strangers are."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, timeout=TIMEOUT, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip

    def client(keep: Any = server) -> Any:
        return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)  # type: ignore

    return client


def keys_of(connect: Callable[[], Any], secrets: list[bytes]) -> list[bytes | CommError]:
    def one(rank: int) -> bytes | CommError:
        try:
            return agree_on_key(connect(), rank, len(secrets), secrets[rank])
        except CommError as error:
            return error

    with ThreadPoolExecutor(len(secrets)) as pool:
        return list(pool.map(one, range(len(secrets))))


def test_ranks_with_one_secret_agree_on_a_key_of_this_run(connect: Callable[[], Any]) -> None:
    first = keys_of(connect, [b"the secret"] * 3)
    assert len(set(first)) == 1
    assert isinstance(first[0], bytes)
    for name in connect().list_keys():
        connect().delete_key(name)
    assert keys_of(connect, [b"the secret"] * 3) != first  # what one run signed is nothing to the next


def test_a_rank_without_the_secret_is_found_by_all(connect: Callable[[], Any]) -> None:
    found = keys_of(connect, [b"the secret", b"the secret", b"a guess"])
    assert all(isinstance(each, CommError) for each in found)
    assert "same --secret-file" in str(found[0])


def test_a_stranger_who_changes_numbers_is_noticed(connect: Callable[[], Any]) -> None:
    """Both ranks read what is there: the stranger writes in between."""
    stranger, store = connect(), connect()
    stranger.set("hello/1", b"x" * 32)
    thread = threading.Thread(
        target=lambda: stranger.wait(["hello/0"]) or stranger.set("hello/0", b"y" * 32)
    )
    thread.start()
    real_set = store.set

    def slow_set(key: str, value: bytes) -> None:
        real_set(key, value)
        thread.join()

    class Slow:
        set = staticmethod(slow_set)
        get = store.get

    with pytest.raises(CommError, match="somebody else writes"):
        agree_on_key(Slow, 0, 2, b"the secret")


def test_what_is_read_is_what_a_rank_wrote_for_that_name(connect: Callable[[], Any]) -> None:
    key = b"k" * 32
    one, other = SignedStore(connect(), key), SignedStore(connect(), key)
    one.set("0", b"address of 0")
    one.set("1", "text")
    assert (other.get("0"), other.get("1")) == (b"address of 0", b"text")
    other.wait(["0", "1"], TIMEOUT)
    assert other.check(["0"])
    assert not other.check(["2"])
    assert (one.add("n", 2), other.add("n", 3)) == (2, 5)
    assert one.compare_set("c", "", "new") == b"new"
    assert other.compare_set("c", "new", "newer") == b"newer"
    assert other.compare_set("c", "new", "newest") == b"newer"
    assert other.delete_key("1")
    assert not one.check(["1"])

    # A stranger sees no name and no place of a rank's; what they write is found out.
    stranger = connect()
    names = [name for name in stranger.list_keys() if name != "init/"]
    assert not {"0", "1", "c"} & set(names)
    values = {name: stranger.get(name) for name in names}
    reads: dict[str, Callable[[], bytes]] = {
        "0": lambda: one.get("0"),
        "c": lambda: one.compare_set("c", "newer", "x"),
    }
    for place, read in reads.items():
        # Their own address, nothing, and what a rank has signed for another name.
        for planted in (b"their address" * 9, b"", values[one._name("c" if place == "0" else "0")]):
            stranger.set(one._name(place), planted)
            assert (
                stranger.get(one._name(place)) == planted
            )  # nobody answers to a set: it is done by now
            with pytest.raises(CommError, match=f"somebody else writes .*: {place} is not"):
                read()
            stranger.set(one._name(place), values[one._name(place)])
    assert one.get("0") == b"address of 0"


def test_it_listens_at_the_address_that_is_named_alone() -> None:
    said: list[str] = []
    for address in ("127.0.0.1", "localhost"):
        with socket.socket(fileno=listen_at(address, 0, said.append)) as listener:
            assert listener.getsockname()[0] in ("127.0.0.1", "::1")
    assert said == []
    with socket.socket(fileno=listen_at("192.0.2.1", 0, said.append)) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    assert "192.0.2.1 is no address of this machine" in said[0]
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(CommError, match=r"cannot listen at 127\.0\.0\.1"),
    ):
        listen_at("127.0.0.1", taken.getsockname()[1], said.append)
    with pytest.raises(CommError, match="cannot be resolved"):
        listen_at("nowhere.invalid", 1, said.append)

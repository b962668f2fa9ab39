"""What operators raise when a peer fails becomes one kind of error; everything else stays as it is."""

from __future__ import annotations

import pytest

from comm.errors import BuildError, PeerError, converting_errors

GLOO = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
BROKEN = "this group failed earlier and cannot be used: "
STEP = "all_reduce (step 7): rank 0 waited 2 s for rank 1 (pid 5), which is at step 6"


class DistNetworkError(RuntimeError):
    """torch's own has this name."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError(STEP + "\nException raised from commit at ops.cpp:1"), STEP),
        (RuntimeError(BROKEN + STEP), BROKEN + STEP),
        (
            RuntimeError("argmax or topk (step 3): rank 1 calls a, rank 0 calls b"),
            "argmax or topk (step",
        ),
        (
            RuntimeError(GLOO),
            "rank 3 stopped waiting for other ranks: Connection closed by peer [127.0.0.1]:1",
        ),
        (DistNetworkError("no route"), "rank 3 stopped waiting for other ranks: no route"),
    ],
)
def test_a_peer_that_fails_is_an_error_whose_message_says_all(
    error: RuntimeError, message: str
) -> None:
    with pytest.raises(PeerError) as found, converting_errors(3):
        raise error
    assert str(found.value).startswith(message) and "\n" not in str(found.value)
    assert found.value.exit_code == 1 and found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2]' is invalid"),
        RuntimeError(""),
        BuildError("no compiler"),
        ValueError(STEP),
    ],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as found, converting_errors(3):
        raise error
    assert found.value is error

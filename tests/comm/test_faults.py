"""Ranks that are killed or stopped, and a /dev/shm that is too small or not as it should be.

Each case makes its ranks without the launcher, which would stop all of them when one is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.running import run_case


def with_shm_of(size: str) -> tuple[str, ...]:
    """Words before a command that give it a /dev/shm of its own; skips where that is not permitted."""
    words = (
        *("unshare", "-m", "sh", "-c"),
        f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"',
        "sh",
    )
    if shutil.which("unshare") is None:
        pytest.skip("no unshare (util-linux)")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this user may not mount a /dev/shm of its own: {tried.stderr.strip()}")
    return words


def test_a_killed_rank_is_named_in_under_two_seconds() -> None:
    """Before, during and after each operator; by rank and pid."""
    print(run_case("faults", "killed"))


def test_a_stopped_rank_is_named_at_the_deadline() -> None:
    run_case("faults", "stopped")


def test_a_group_that_failed_stays_broken_and_others_work() -> None:
    run_case("faults", "broken")


def test_too_little_shared_memory_is_said_with_what_to_do() -> None:
    run_case("segments", "little_memory", with_shm_of("1m"))


def test_shared_memory_that_is_taken_meanwhile_is_no_bus_error() -> None:
    run_case("segments", "memory_that_is_taken", with_shm_of("4m"))


def test_garbage_under_the_name_is_replaced_or_refused() -> None:
    run_case("segments", "segment_of_another")


def test_a_header_that_is_overwritten_while_joining_is_reported() -> None:
    run_case("segments", "garbled_header")


def test_what_a_killed_run_left_is_replaced() -> None:
    run_case("segments", "stale_segment")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_segment_of_another_user_is_refused() -> None:
    run_case("segments", "foreign_segment")


def test_groups_leave_no_mapping_and_no_descriptor() -> None:
    run_case("segments", "many_groups")


def test_a_forked_child_cannot_use_or_harm_a_group() -> None:
    run_case("faults", "forked_child")


def test_closed_groups() -> None:
    run_case("faults", "closed")

"""What other users of the machine can do to a run: nothing; and what a run does to theirs: nothing."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from base.errors import LaunchError
from launcher import meeting, watch
from launcher.guard import MARK, kill_groups, mark_of, remove_segments
from launcher.manager import Managed
from launcher.meeting import meet
from launcher.output import open_log
from launcher.rank import Rank
from launcher.user_secret import read_secret, user_secret
from tests.leftovers import own_processes
from tests.others import NOBODY, as_root, by_nobody, nobody_runs
from tests.running import CHECKOUT


def place(rank: int, run_id: str) -> Managed:
    return Managed("mpirun", rank, 2, rank, 2, "127.0.0.1", 0, run_id, variables=(("A", "B"),))


def test_no_command_line_has_the_token(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(300)\n")
    words = [sys.executable, str(CHECKOUT / "launch.py"), "run", "--ranks", "1", str(script)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        guards = [
            p.cmdline() for p in own_processes() if p.cmdline()[-1:] and "guard.py" in str(p.cmdline())
        ]
        process.terminate()
    assert guards and all(words[-1].endswith("guard.py") for words in guards)


def test_what_is_not_ours_in_shared_memory_stays() -> None:
    """Entries that cannot be removed are no obstacle to those that can."""
    token = f"test-{secrets.token_hex(8)}"
    first, own, last = (Path("/dev/shm") / f"yoke-{token}{end}" for end in ("-0", "-1", "-2"))
    foreign = Path("/dev/shm") / f"yoke-{token}-foreign"
    first.mkdir()
    last.mkdir()
    own.write_bytes(b"x")
    if os.geteuid() == 0:
        foreign.write_bytes(b"x")
        os.chown(foreign, NOBODY, NOBODY)
    try:
        remove_segments(token)
        assert not own.exists() and first.exists() and last.exists()
        assert foreign.exists() == (os.geteuid() == 0)
    finally:
        first.rmdir()
        last.rmdir()
        foreign.unlink(missing_ok=True)


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(read_secret(path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(found)) == 1 and len(found[0]) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(path.parent.iterdir()) == [path]
    path.chmod(0o644)
    assert read_secret(path) == b""
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic link"):
        read_secret(path)


def test_without_a_home_there_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    assert user_secret() == b""


def test_where_ranks_meet_cannot_be_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for user in ("a", "b"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / user))
        names |= {meeting._socket_name(place(rank, "job 1")) for rank in range(2)}
    assert len(names) == 2  # the same for all ranks of a user, and another for another


@as_root
def test_a_name_that_another_user_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no secret: one message, and the other ranks do not take what that user says."""
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    monkeypatch.setattr("launcher.meeting._PATIENCE_S", 0.1)
    run_id = secrets.token_hex(8)
    code = (
        "import socket\ndoor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"door.bind({meeting._socket_name(place(0, run_id))!r})\n"
        "door.listen()\nprint('up', flush=True)\n"
        "while True:\n    peer, _ = door.accept()\n    peer.send(b'x' * 20)\n"
    )
    command = by_nobody(os.path.realpath(sys.executable), "-I", "-S", "-c", code)
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/") as squatter:
        try:
            assert squatter.stdout is not None and squatter.stdout.readline() == b"up\n"
            with pytest.raises(
                LaunchError, match=rf"a process of user {NOBODY} already runs as rank 0 of this run"
            ):
                meet(place(0, run_id), 5.0)
            with pytest.raises(LaunchError, match="rank 0 did not answer rank 1"):
                meet(place(1, run_id), 0.5)
        finally:
            squatter.kill()


def test_a_log_is_a_new_file_of_this_user(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("kept")
    log = tmp_path / "rank-0.log"
    log.symlink_to(private)
    with pytest.raises(LaunchError, match=r"rank-0\.log is not a plain file"):
        open_log(tmp_path, 0)
    assert private.read_text() == "kept"
    log.unlink()
    log.hardlink_to(private)  # a new file in its place
    with open_log(tmp_path, 0) as file:
        file.write(b"new")
    assert private.read_text() == "kept" and log.read_text() == "new"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@as_root
def test_a_log_that_another_user_has_planted(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"yoke-test-{secrets.token_hex(8)}"
    folder.mkdir()
    folder.chmod(0o1777)
    try:
        nobody_runs(f"open({str(folder / 'rank-0.log')!r}, 'w').close()")
        with pytest.raises(LaunchError, match=r"rank-0\.log is another user's"):
            open_log(folder, 0)
    finally:
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()


def test_a_rank_keeps_its_number_until_its_group_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], process_group=0)
    rank = Rank(0, process)
    deadline = time.monotonic() + 60
    while not rank.has_ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rank.code == 3
    os.killpg(process.pid, signal.SIGTERM)  # nobody else can have the number: it is there
    watch.kill_groups([rank])
    assert not psutil.pid_exists(process.pid) and rank.code == 3
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("a number that may be another's"))
    watch.kill_groups([rank])


def test_the_guard_kills_only_the_runs_processes() -> None:
    """A group's number may be another group's by the time that the launcher has died."""
    session = secrets.token_hex(8)
    first = subprocess.Popen(
        ["sleep", "300"], process_group=0, env={**os.environ, MARK: mark_of(session)}
    )
    others = [
        subprocess.Popen(["sleep", "300"], process_group=first.pid, env={**os.environ, **env})
        for env in ({}, {MARK: mark_of("another")})
    ]
    try:
        kill_groups({first.pid}, session)
        assert first.wait(30) == -signal.SIGKILL
        assert [other.poll() for other in others] == [None, None]
    finally:
        for process in (first, *others):
            process.kill()
            process.wait()

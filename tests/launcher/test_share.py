"""Two runs at once: what each is bound to, and what is said where they share cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from base.errors import LaunchError
from launcher.claims import locked, note, read_claims, runs_folder
from launcher.plan import LaunchPlan, LaunchRequest, plan_launch
from launcher.share import Claim
from tests.launcher.test_plan import machine
from tests.running import CHECKOUT, RunYoke

ONE, FIRST = Claim(7, (0,)), Claim(7, tuple(range(4)))


def cpus(plan: LaunchPlan) -> list[tuple[int, ...]]:
    return [rank.cpus for rank in plan.ranks]


def test_shared_cores_are_left_whole() -> None:
    """A core of which another run has one hardware thread is not left."""
    request = LaunchRequest(share=True, claims=(Claim(7, (9,)),))
    plan = plan_launch(machine(1, 1, 8, smt=2), request)
    assert plan.bind_cores and cpus(plan) == [(0, 2, 3, 4, 5, 6, 7)]
    assert "pid 7 has cpus 9: the ranks get what is left (--share)" in plan.reasons
    listed = LaunchRequest(share=True, core_list=(0, 1, 2), claims=(ONE,))
    assert cpus(plan_launch(machine(1, 1, 8), listed)) == [(1, 2)]
    with pytest.raises(LaunchError, match="--share: no core is left; pid 7 has cpus 0-3"):
        plan_launch(machine(1, 1, 4), LaunchRequest(share=True, claims=(FIRST,)))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        # Four sockets of four cores; another run is bound to the first one.
        (LaunchRequest(ranks=2, bind_cores=True), [(4, 5, 6, 7), (8, 9, 10, 11)]),
        (LaunchRequest(ranks=1, bind_cores=True), [tuple(range(4, 16))]),
        (LaunchRequest(ranks=3, rank_per="socket"), [(4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]),
    ],
)
def test_ranks_take_sockets_that_are_free(
    request_: LaunchRequest, expected: list[tuple[int, ...]]
) -> None:
    plan = plan_launch(machine(4, 1, 4), replace(request_, claims=(ONE,)))
    assert cpus(plan) == expected
    assert not [reason for reason in plan.reasons if "another run" in reason]


@pytest.mark.parametrize(
    "request_",
    [
        LaunchRequest(bind_cores=True, claims=(FIRST,)),  # one rank per socket, and there are two
        LaunchRequest(ranks=2, bind_cores=True, claims=(FIRST,)),
        LaunchRequest(core_list=(2, 3), claims=(FIRST,)),
    ],
)
def test_else_it_is_said(request_: LaunchRequest) -> None:
    plan = plan_launch(machine(2, 1, 4), request_)
    (said,) = (reason for reason in plan.reasons if "another run" in reason)
    assert "(pid 7)" in said and "--share" in said
    assert ("cpus 2-3 are" if request_.core_list else "cpus 0-3 are") in said


def test_a_run_that_is_not_bound_does_not_mind() -> None:
    plan = plan_launch(machine(1, 1, 4), LaunchRequest(claims=(FIRST,)))
    assert not [reason for reason in plan.reasons if "another run" in reason]


def test_claims_are_those_of_runs_that_live(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with locked(tmp_path):
            note(tmp_path, (0, 1, 5), stack)
            assert read_claims(tmp_path) == (Claim(os.getpid(), (0, 1, 5)),)
        dead = tmp_path / "1-dead.json"
        dead.write_text(json.dumps({"pid": 1, "cpus": "3"}))
        assert len(read_claims(tmp_path)) == 1
        assert not dead.exists()
        (own,) = tmp_path.glob("*.json")
        assert own.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.json"))


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = runs_folder()
    assert folder == tmp_path.resolve() / "yoke" / "runs"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # another user could put claims there
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert runs_folder() == tmp_path.resolve() / "tmp" / f"yoke-{os.geteuid()}" / "runs"


@contextmanager
def bound_to(cpu: int, folder: Path) -> Iterator[int]:
    """A run that is bound to a cpu, then killed; yields the launcher's pid."""
    script = folder / "waits.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(300)\n")
    words = ["run", "--bind-core-list", str(cpu), str(script)]
    with subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), *words],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process.pid
        process.kill()


def test_a_second_run_takes_what_is_left_or_warns(run_yoke: RunYoke, tmp_path: Path) -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        pytest.skip("one cpu")
    script = tmp_path / "mask.py"
    script.write_text("import json, os\nprint(json.dumps(sorted(os.sched_getaffinity(0))))\n")
    with bound_to(first, tmp_path) as pid:
        shared = run_yoke("run", "--share", "--ranks", "1", str(script))
        assert shared.returncode == 0, shared.stderr
        assert first not in json.loads(shared.stdout) and shared.stderr == ""
        same = run_yoke("run", "--bind-core-list", str(first), str(script))
        assert json.loads(same.stdout) == [first]
        assert same.stderr.startswith(f"warning: cpus {first} are bound to another run too (pid {pid})")
        none = run_yoke("run", "--share", "--bind-core-list", str(first), str(script))
        assert (none.returncode, none.stdout) == (2, "")
        assert f"no core is left; pid {pid} has cpus {first}" in none.stderr
        reasons = json.loads(run_yoke("plan", "--share", "--json").stdout)["reasons"]
        assert f"pid {pid} has cpus {first}: the ranks get what is left (--share)" in reasons
    after = run_yoke("run", "--bind-core-list", str(first), str(script))
    assert (json.loads(after.stdout), after.stderr) == ([first], "")

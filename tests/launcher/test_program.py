"""`run`: any program of the user's, on every rank, as the interpreter alone would have run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from base.errors import LaunchError
from launcher.flags import parse_flags
from launcher.program import check_program
from tests.running import CHECKOUT, RunYoke

REPORT = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "path0": sys.path[0], "rank": os.environ["RANK"],
    "variables": sorted(v for v in os.environ if v in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
    "cpus": sorted(os.sched_getaffinity(0)), "file": globals().get("__file__"),
}), flush=True)
"""


def reports(out: str) -> dict[int, dict[str, Any]]:
    """By rank, whether the line has a prefix or not."""
    lines = [json.loads(line[line.index("{") :]) for line in out.splitlines()]
    return {int(line["rank"]): line for line in lines}


def test_a_script_sees_torchruns_world_and_its_own_arguments(run_yoke: RunYoke, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REPORT)
    result = run_yoke("run", "--bind-cores-to-rank", "--ranks", "2", str(script), "--ranks", "7", "a=b")
    assert result.returncode == 0, result.stderr
    seen = reports(result.stdout)
    assert set(seen) == {0, 1}
    for report in seen.values():
        assert report["argv"] == [str(script), "--ranks", "7", "a=b"]
        assert report["name"] == "__main__"
        assert report["path0"] == str(tmp_path)
        assert report["file"] == str(script)
        assert len(report["variables"]) == 6
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(seen[0]["cpus"]) & set(seen[1]["cpus"])


def test_a_module_of_the_users_hides_ours(tmp_path: Path) -> None:
    # Named as packages of Yoke's, one of which the launcher itself has imported.
    for name in ("models", "launcher", "comm"):
        (tmp_path / f"{name}.py").write_text(f"WHOSE = 'mine: {name}'\n")
    (tmp_path / "job.py").write_text(
        "import models, launcher, comm, sys\n"
        "print(models.WHOSE, launcher.WHOSE, comm.WHOSE, sys.argv[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, str(CHECKOUT / "launch.py"), "run", "-m", "job", "--x"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "mine: models mine: launcher mine: comm ['--x']"


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(5)", 5, "rank 1 (pid"),
        ("sys.exit('out of ideas')", 1, "out of ideas"),
        ("raise RuntimeError('boom')", 1, "RuntimeError: boom"),
        ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", 139, "was killed by SIGSEGV"),
    ],
)
def test_how_a_program_ends_is_how_the_run_ends(
    run_yoke: RunYoke, tmp_path: Path, ending: str, code: int, words: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n"
        f"    {ending}\nif '{words}':\n    time.sleep(60)\n"
    )
    result = run_yoke("run", "--ranks", "2", "--grace", "2", str(script), timeout=120)
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    if "RuntimeError" in words:  # the program's frames alone
        assert "launcher/" not in result.stderr


def test_the_example_runs(run_yoke: RunYoke) -> None:
    result = run_yoke(
        "run",
        "--bind-cores-to-rank",
        "--ranks",
        "2",
        str(CHECKOUT / "examples" / "all_reduce.py"),
        "--size",
        "1000",
    )
    assert result.returncode == 0, result.stderr
    assert "sum 3 over 2 ranks" in result.stdout


def test_what_follows_the_program_is_its_own() -> None:
    flags = parse_flags(["--ranks", "2", "run", "--smt", "x.py", "--ranks", "3", "--json"])
    assert (flags.command, flags.program) == ("run", ["x.py", "--ranks", "3", "--json"])
    assert (flags.request.ranks, flags.request.smt, flags.json) == (2, True, False)
    assert flags.head == ["--ranks", "2", "run", "--smt"]
    flags = parse_flags(["run", "--log_dir=/tmp/logs", "-m", "pkg.mod", "-m", "x"])
    assert flags.program == ["-m", "pkg.mod", "-m", "x"]
    assert flags.options.log_dir == Path("/tmp/logs")
    assert flags.head == ["run", "--log_dir=/tmp/logs"]


def test_a_program_that_is_not_there_is_refused() -> None:
    for words in ([], ["-m"], ["no/such/file.py"]):
        with pytest.raises(LaunchError, match="run"):
            check_program(words)

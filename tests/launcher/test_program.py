"""`run`: any program of the user's, on every rank, as the interpreter alone would have run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from base.errors import LaunchError
from base.streams import UNREAD
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


@pytest.mark.parametrize("name", ["nosuch", "pkg.nosuch", "nosuch.part", "pkg", "plain.part"])
def test_a_module_that_is_not_there_is_one_message(
    name: str, run_yoke: RunYoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "plain.py").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run_yoke("run", "--ranks", "2", "-m", name, "-v")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: -m {name}: ") and result.stderr.count("\n") == 1


def test_a_module_that_a_program_needs_is_its_own_error(
    run_yoke: RunYoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("import nosuch\n")
    (tmp_path / "pkg" / "part.py").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run_yoke("run", "--ranks", "2", "-m", "pkg.part")
    assert result.returncode == 1
    assert "import nosuch" in result.stderr and result.stderr.count("ModuleNotFoundError") == 1


PIECES = """
import os, sys
rank = os.environ["RANK"]
for i in range(200):
    for word in ("rank", rank, "says", str(i)):
        print(word, end=" ", flush=True)
        if i % 50 == 0:
            print("and", end=" ", flush=True, file=sys.stderr)
    print(flush=True)
print("end", end="")
print(file=sys.stderr)
"""
LINE = r"(\[rank [1-9]\] )?(rank \d says \d+ |end|(and )+)"


@pytest.mark.parametrize("streams", ["two", "one"])
def test_lines_that_are_printed_in_pieces_do_not_mix(tmp_path: Path, streams: str) -> None:
    script = tmp_path / "pieces.py"
    script.write_text(PIECES if streams == "two" else PIECES.replace("i % 50 == 0", "False"))
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "launch.py"), "run", "--ranks", "3", str(script)],
        stdout=subprocess.PIPE, text=True, timeout=120, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE if streams == "two" else subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert not [line for line in lines if not re.fullmatch(LINE, line)]
    assert len(lines) == 3 * 201


def test_at_a_terminal_pieces_of_rank_0_are_shown_at_once_and_lines_do_not_mix(tmp_path: Path) -> None:
    script = tmp_path / "pieces.py"
    # Rank 1 prints while rank 0's line is open, and rank 0 ends it only when it has seen that.
    script.write_text(
        "import os, sys, time\n"
        "here = os.path.dirname(os.path.abspath(__file__))\n"
        "def wait_for(name):\n"
        "    while not os.path.exists(os.path.join(here, name)): time.sleep(0.01)\n"
        "if os.environ['RANK'] == '0':\n"
        "    print(sys.stdout.isatty(), os.get_terminal_size().columns)\n"
        "    print('asked', end=' ', flush=True)\n"
        "    wait_for('seen')\n"
        "    print('answered')\n"
        "else:\n"
        "    wait_for('asked')\n"
        "    print('beside', file=sys.stderr)\n"
    )
    terminal = pexpect.spawn(
        sys.executable, [str(CHECKOUT / "launch.py"), "run", "--ranks", "2", str(script)],
        encoding="utf-8", timeout=60, dimensions=(24, 91),
    )  # fmt: skip
    try:
        terminal.expect_exact("True 91\r\nasked ")
        (tmp_path / "asked").touch()
        terminal.expect_exact("\r\n[rank 1] beside\r\n")
        assert terminal.before == ""
        (tmp_path / "seen").touch()
        terminal.expect_exact("answered\r\n")
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)
    assert terminal.exitstatus == 0


def test_a_reader_that_goes_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\nwhile True:\n    print('line', flush=True)\n    time.sleep(0.01)\n")
    with subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), "run", "--ranks", "2", str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().endswith("line\n")
        process.stdout.close()
        assert process.wait(60) == UNREAD

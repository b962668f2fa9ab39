"""Programs with streams that are closed, full, unread, or of an encoding that lacks characters."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tty
from pathlib import Path

import pytest

from base.errors import LaunchError
from base.streams import printable
from launcher.output import Outlet, pieces

CHECKOUT = Path(__file__).resolve().parent.parent.parent
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"PYTHONIOENCODING": "latin-1"}
LAUNCH = ("launch.py",)
CLOSED = "error: standard output is closed, so no result can be shown"
FULL = "error: standard output cannot be written (No space left on device)\n"
LOST = 74


def shell(redirections: str, words: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[bytes]:
    """`python words... redirections`, as a shell does it."""
    return subprocess.run(
        ["bash", "-c", f'exec "$0" "$@" {redirections}', sys.executable, *words],
        cwd=CHECKOUT,
        capture_output=True,
        timeout=120,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("words", [("plan",), ("models", "--json"), ("--help",)])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_message(words: tuple[str, ...], unbuffered: str) -> None:
    done = shell(">/dev/full", (*LAUNCH, *words), PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr.decode()) == (LOST, FULL)


@pytest.mark.parametrize(
    "words", [("-m", "tp.reshard", "--help"), ("-m", "quantize", "--help"), (*LAUNCH, "quantize")]
)
def test_the_offline_programs_too(words: tuple[str, ...]) -> None:
    done = shell(">/dev/full", words, PYTHONUNBUFFERED="1")
    assert (done.returncode, done.stderr.decode()) == (LOST, FULL)


def test_a_closed_output_is_refused() -> None:
    done = shell(">&-", (*LAUNCH, "plan"))
    assert done.returncode == 2
    assert done.stderr.decode().startswith(CLOSED) and done.stderr.count(b"\n") == 1
    assert shell(">&- 2>&- <&-", (*LAUNCH, "plan")).returncode == 2


@pytest.mark.parametrize("redirection", ["2>&-", "<&-", "<&- 2>&-", "2>/dev/full"])
def test_what_is_not_needed_may_be_closed(redirection: str) -> None:
    done = shell(redirection, (*LAUNCH, "plan", "--json"))
    assert done.returncode == 0 and json.loads(done.stdout)["ranks"]


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_message_that_is_lost_changes_nothing(redirection: str) -> None:
    assert shell(redirection, (*LAUNCH, "plan", "--ranks", "0")).returncode == 2


def test_no_prompts_from_a_closed_input() -> None:
    done = shell("<&-", (*LAUNCH, "model=tiny", "weights=random", "prompts=-"))
    assert done.returncode == 2 and done.stderr.startswith(b"error: prompt= is missing")


def test_a_program_may_have_no_output(tmp_path: Path) -> None:
    """A descriptor that it opens must not become its stdout, either."""
    script = tmp_path / "quiet.py"
    script.write_text(f"print('lost'); open({str(tmp_path / 'kept')!r}, 'w').write('kept')\n")
    done = shell(">&-", (*LAUNCH, "run", "--ranks", "2", str(script)))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "kept").read_text() == "kept"


def test_other_ranks_output_is_missed_too(tmp_path: Path) -> None:
    """It passes through the launcher, in pieces of any size and in the rank's own encoding."""
    script = tmp_path / "loud.py"
    script.write_text("import os\nprint('é' + 'x' * 20000 if os.environ['RANK'] == '1' else '')\n")
    words = (*LAUNCH, "run", "--ranks", "2", str(script))
    done = shell(">/dev/full", words)
    assert (done.returncode, done.stderr.decode()) == (LOST, FULL)
    done = shell("", words, **LATIN)
    assert done.returncode == 0 and b"[rank 1] \xe9xxx" in done.stdout


def test_a_log_on_a_full_disk_is_one_message() -> None:
    with (
        open("/dev/full", "wb", buffering=0) as log,
        pytest.raises(LaunchError, match=r"/dev/full cannot be written \(No space left on device\)"),
    ):
        pieces(sys.stdout, Outlet(), log)(b"text")


TEXTS = ["naïve", "猫 “x”", "\udce9", "\ud800 alone"]
SPEAK = f"""
from base.streams import running, say, show, show_json
def main():
    for text in {TEXTS!a}:
        show(text); show_json(text); say(text)
    return 0
raise SystemExit(running(main))
"""


@pytest.mark.parametrize(
    ("encoding", "env"),
    [
        ("ascii", C_LOCALE),
        ("latin-1", LATIN),
        ("ascii", {"PYTHONIOENCODING": "ascii:surrogateescape"}),
        ("utf-8", {"PYTHONIOENCODING": "utf-8"}),
    ],
)
def test_no_character_is_refused(encoding: str, env: dict[str, str]) -> None:
    done = shell("", ("-c", SPEAK), **env)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[::2] == [text.encode(encoding, "replace") for text in TEXTS]
    assert [json.loads(line.decode(encoding)) for line in lines[1::2]] == TEXTS


@pytest.mark.parametrize("env", [C_LOCALE, LATIN])
def test_an_answer_in_any_locale(env: dict[str, str]) -> None:
    """A prompt comes as UTF-8 whatever the locale is; the answer goes out in what it can."""
    words = ("model=tiny", "weights=random", "compile=false", "max_new_tokens=2", "output=json")
    here, plain = (
        shell("", (*LAUNCH, "--ranks", "1", *words, "prompt=é猫"), **variables)
        for variables in (env, {})
    )
    assert here.returncode == 0, here.stderr
    assert json.loads(here.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]


def test_a_prompt_that_is_not_text() -> None:
    done = shell("", (*LAUNCH, "model=tiny", "weights=random", os.fsdecode(b"prompt=\xff")))
    assert done.returncode == 2
    assert done.stderr == b"error: prompt= is not text in UTF-8 (invalid start byte)\n"


def test_no_text_commands_a_terminal() -> None:
    """What a model, a template or a file's name says: as it is in a pipe, without control characters on
    a terminal and in messages."""
    evil = "a\tb\n\x1b]0;x\x07\r\x9b1m\x7fé\u2028"
    harmless = "a\tb\n\ufffd]0;x\ufffd\ufffd\ufffd1m\ufffdé\u2028"
    assert printable(evil) == harmless
    code = (
        f"from base.streams import *\nshow({evil!a}); show('\\x1b[2mx', escapes=True)\n"
        f"show_json({evil!a}); say({evil!a})"
    )
    done = shell("", ("-c", code), PYTHONIOENCODING="utf-8")
    *shown, line = done.stdout.decode().removesuffix("\n").split("\n")
    assert shown == [*evil.split("\n"), "\x1b[2mx"]
    assert json.loads(line) == evil and printable(line) == line and len(line.splitlines()) == 1
    assert done.stderr.decode() == harmless + "\n"
    master, slave = pty.openpty()
    tty.setraw(slave)
    words = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    subprocess.run(words, stdout=slave, cwd=CHECKOUT, env=env, timeout=60, check=True)
    os.close(slave)
    assert os.read(master, 4096).decode().startswith(f"{harmless}\n\x1b[2mx\n")
    os.close(master)

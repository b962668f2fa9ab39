"""The README's commands, run as they stand there: a new user types them in this order.

Each command line of its block "Commands" must match a rule below, which says how it ends and what it
prints. The transcript of `make demo` is compared by its shape: every number may differ.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.test_compiling import cache_with_extensions
from tests.running import CHECKOUT

README = (CHECKOUT / "README.md").read_text()


@dataclass(frozen=True)
class Rule:
    """How a command ends: its exit code, and patterns of what it prints."""

    code: int
    out: str = ""
    err: str = ""
    typed: str | None = None  # on standard input


FIGURES = (
    r"\[\d+ \+ \d+ tokens \| TTFT \d+ ms \| TPOT [\d.]+ ms \| .* tokens/s \| "
    r".* over (shm|none) \| rank 0 on "
)
# By what the command contains; the first that matches.
RULES = {
    r"launch\.py$": Rule(0, r"python launch\.py \[flags\]"),
    r"launch\.py plan ": Rule(0, r"rank 0"),
    r"launch\.py doctor": Rule(0, r"(?s)cores.*memory"),
    r"launch\.py models": Rule(0, r"(?s)family +model +params.*smollm2-135m"),
    r"launch\.py cache": Rule(0, r"nothing is kept|steps"),
    r"chat model=llama-3.1-8b fetch=true": Rule(2, err=r"error: "),  # there is no network in a test
    r" chat model=smollm2": Rule(0, r"\w", typed="Say hello.\n"),
    r"path/to/model\.gguf": Rule(2, err=r"error: .*path/to/model\.gguf.* does not exist|no such"),
    r"launch\.py --bind-cores-to-rank model=smollm2-135m$": Rule(
        0, r"\w", FIGURES, typed="The capital of France is\n"
    ),
    r"model=smollm2-135m .*prompt=": Rule(0, r"\w", FIGURES),
    r"model=llama-70b weights=random": Rule(0, r"", FIGURES),
    r"launch\.py quantize": Rule(0, r"", r""),
    r"launch\.py run ": Rule(0, r"\d"),
    r"tp\.reshard": Rule(2, err=r"llama-2-70b-8 does not exist"),
}


def commands() -> list[str]:
    block = README.split("## Commands", 1)[1].split("```", 2)[1]
    return [line.split("  #")[0].strip() for line in block.strip().splitlines()]


def rule_of(command: str) -> Rule:
    found = [rule for pattern, rule in RULES.items() if re.search(pattern, command)]
    assert found, f"no rule of this test matches the README's {command!r}"
    return found[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty cache, but for the operators, and the checkout's files in a folder of its
    own: what commands write does not land in the checkout."""
    home = tmp_path_factory.mktemp("home")
    cache_with_extensions(home)
    (home / "yoke").rename(home / "built")
    cache = home / ".cache" / "yoke"
    cache.parent.mkdir(mode=0o700)
    (home / "built").rename(cache)
    folder = home / "checkout"
    folder.mkdir()
    for path in CHECKOUT.iterdir():
        (folder / path.name).symlink_to(path)
    return home


def run(home: Path, command: str, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "python"
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_"))
    }
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=home / "checkout",
        env=variables | {"HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"},
        input=typed or "",
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_command_does_what_the_readme_says(command: str, home: Path) -> None:
    rule = rule_of(command)
    done = run(home, command, rule.typed)
    assert done.returncode == rule.code, done.stderr
    assert re.search(rule.out, done.stdout), done.stdout
    assert re.search(rule.err, done.stderr), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if rule.code:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows(home: Path) -> None:
    transcript = README.split("$ make demo\n", 1)[1].split("```", 1)[0]
    recipe = (CHECKOUT / "Makefile").read_text()
    (line,) = re.findall(r"^\t\$\(BIN\)/python (launch\.py .*)$", recipe, re.MULTILINE)
    prompt, ranks = (
        re.findall(rf"^{name} \?= (.*)$", recipe, re.MULTILINE)[0] for name in ("PROMPT", "RANKS")
    )
    line = line.replace("$(RANKS:%=--ranks %)", f"--ranks {ranks}").replace("$(PROMPT)", prompt)
    done = run(home, f"python {line}")
    assert done.returncode == 0, done.stderr
    typed, answer, figures = transcript.strip("\n").splitlines()
    assert typed == f".venv/bin/python {line}"  # as make echoes it
    assert shape(done.stderr.strip().splitlines()[-1]) == shape(figures)
    # The next words depend on how a processor rounds.
    assert answer.split()[:6] == done.stdout.split()[:6]


def shape(line: str) -> str:
    """The line without what differs between machines and runs: numbers, and when it was compiled."""
    line = re.sub(r"(compile|compiled after) [\d.]+ s|\w[\w, ]* not compiled yet", "compiling", line)
    line = re.sub(r"cpus [\d,-]+ node [\d,-]+", "cpus", line)
    return re.sub(r"[\d.]+", "N", line)

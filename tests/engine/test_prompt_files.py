"""Files of prompts through the command: answers in order, each as if it were alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import RunYoke

CHECKOUT = Path(__file__).resolve().parent.parent.parent
WORDS = ("model=tiny", "weights=random", "compile=false", "dtype=float32")
LINES = [
    {"prompt": "hello", "id": "first"},
    {"prompt": "x" * 30, "temperature": 1.0, "seed": 4, "max_new_tokens": 3},
    {"messages": [{"role": "user", "content": "hi"}], "repetition_penalty": 1.3},
    {"prompt": "hello", "temperature": 1.0, "seed": 5},
    {"prompt": "hello", "logprobs": 2, "max_new_tokens": 4},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return path


def answers(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_answers_come_in_order_whatever_the_batch_and_the_ranks(file: Path, run_yoke: RunYoke) -> None:
    runs = []
    for ranks, batch in ((1, 1), (2, 2), (2, 0)):
        done = run_yoke(
            f"--ranks={ranks}", *WORDS, f"prompts={file}", f"batch={batch}", "output=json",
            "max_new_tokens=9",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = answers(done.stdout)
        assert [answer["index"] for answer in found] == list(range(len(LINES)))
        assert [answer["id"] for answer in found] == ["first", None, None, None, None]
        assert [answer["tokens"] for answer in found] == [9, 3, 9, 9, 4]
        assert [len(answer["logprobs"]) for answer in found] == [0, 0, 0, 0, 4]
        assert "5 prompts" in done.stderr.splitlines()[-1]
        runs.append([answer["token_ids"] for answer in found])
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0] != runs[0][3]
    assert runs[0][0][:4] == runs[0][4]
    file.write_text(json.dumps(LINES[3]))
    done = run_yoke(*WORDS, f"prompts={file}", "max_new_tokens=9", "output=json")
    alone = json.loads(done.stdout)
    assert alone["token_ids"] == runs[0][3]


def test_standard_input_and_text(run_yoke: RunYoke) -> None:
    """Read for `prompts=-`, and where there is no prompt."""
    command = [sys.executable, str(CHECKOUT / "launch.py"), *WORDS, "max_new_tokens=4"]
    for words in (["prompts=-"], []):
        done = subprocess.run(
            [*command, *words], input="abc\n\nde\n", capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        parts = done.stdout.split("\n\n")
        assert [part.splitlines()[0] for part in parts if part] == ["[1] abc", "[2] de"]
    lines = 'abc\n{"prompt": "x"}\n'
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard input line 2 begins like a JSON object")


def test_a_wait_for_standard_input_is_said() -> None:
    command = [sys.executable, str(CHECKOUT / "launch.py"), *WORDS, "max_new_tokens=4"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("reading prompts from standard input")
        process.communicate("\n")
    assert process.returncode == 2


def test_one_prompt_that_does_not_fit_is_named(tmp_path: Path, run_yoke: RunYoke) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "x" * 100 + "\n")
    done = run_yoke("--ranks=2", *WORDS, f"prompts={path}", "max_seq_len=80", "max_new_tokens=8")
    assert done.returncode == 2
    assert f"{path} line 2 has 100 tokens" in done.stderr
    assert done.stderr.count("error: ") == 1


def test_a_stop_text_ends_the_answer(run_yoke: RunYoke) -> None:
    words = (*WORDS, "prompt=hello", "max_new_tokens=30", "output=json")
    whole = json.loads(run_yoke(*words).stdout)
    stop = whole["text"][6:9]
    cut = json.loads(run_yoke("--ranks=2", *words, f"stop={stop}").stdout)
    assert cut["finish"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["tokens"] < whole["tokens"] == 30
    assert whole["finish"] == "length"

"""A resharded checkpoint says what the original says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import CHECKOUT, RunYoke


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_resharded_model_gives_the_same_tokens(
    ranks: int, gguf: Path, tmp_path: Path, run_yoke: RunYoke
) -> None:
    out = tmp_path / "resharded"
    command = [sys.executable, "-m", "tp.reshard", "--to", str(ranks), str(gguf), str(out)]
    subprocess.run(command, check=True, cwd=CHECKOUT, timeout=120)
    words = [
        "--bind-cores-to-rank", f"--ranks={ranks}", "prompt=The capital of France is",
        "max_new_tokens=12", "compile=false", "dtype=float32", "output=json",
    ]  # fmt: skip
    answers = []
    for model in (gguf, out):
        done = run_yoke(*words, f"model={model}")
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout)["token_ids"])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12

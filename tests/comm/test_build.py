"""The extension is built once, by one process, and found again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comm import build
from comm.errors import BuildError


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    """A compiler that counts its calls, and two builders at the same time."""
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo 1;; *) echo x >> "$CALLS"; sleep 1;'
        ' for a; do case "$last" in -o) : > "$a";; esac; last=$a; done;; esac\n'
    )
    compiler.chmod(0o755)
    calls = tmp_path / "calls"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler), "CALLS": str(calls)}
    command = [sys.executable, "-m", "comm.build"]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(2)
    ]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    # Each file once, and the link.
    assert calls.read_text().count("x") == len(list(build.SOURCE_DIR.glob("*.cpp"))) + 1


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such header' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="no such header"):
        build.build_extension()
    left = [path.name for path in (tmp_path / "yoke/extensions").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []

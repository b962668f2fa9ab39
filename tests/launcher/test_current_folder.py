"""No module that lies in the current folder is imported, whatever its name; `python -P` works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.elastic import agent_command
from tests.running import CHECKOUT

NAMES = (
    "torch", "numpy", "json", "argparse", "subprocess", "socket", "random", "typing", "base", "comm",
    "launcher", "launch", "engine", "models", "weights", "kernels", "tp", "quantize", "rich", "psutil",
    "omegaconf", "yaml", "transformers", "tokenizers", "safetensors", "jinja2", "gguf", "sitecustomize",
)  # fmt: skip
PLANTED = "import os\nopen(os.path.join({folder!r}, 'imported'), 'a').write(__name__ + ' ')\n"
GENERATE = ("model=tiny", "weights=random", "prompt=hello", "max_new_tokens=2", "dtype=float32")
LAUNCH = str(CHECKOUT / "launch.py")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder full of modules that leave a word when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(PLANTED.format(folder=str(tmp_path)))
    return folder


def run_in(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
    )
    imported = folder.parent / "imported"
    assert not imported.exists(), imported.read_text()
    return result


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--json"),
        ("models", "--json"),
        ("doctor", "--json"),
        ("quantize", "--help"),
        ("--ranks", "2", "compile=false", *GENERATE),
        ("--ranks", "2", "--comm", "gloo", "compile=false", *GENERATE),
    ],
)
def test_each_command_in_a_folder_of_modules(trap: Path, words: tuple[str, ...]) -> None:
    result = run_in(trap, LAUNCH, *words)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", ["tp/reshard.py", "quantize/__main__.py"])
def test_offline_programs_in_a_folder_of_modules(trap: Path, script: str) -> None:
    assert run_in(trap, str(CHECKOUT / script), "--help").returncode == 0
    module = script.removesuffix(".py").replace("/", ".")
    assert run_in(trap, "-P", "-m", module, "--help", PYTHONPATH=str(CHECKOUT)).returncode == 0


def test_the_agent_in_a_folder_of_modules(trap: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("print('ran')\n")
    command = agent_command(Path(LAUNCH), ["run"], [str(program)], 1, 0, "127.0.0.1:0", 1)
    assert command[0] == sys.executable
    result = run_in(trap, *command[1:])
    assert (result.returncode, result.stdout) == (0, "ran\n"), result.stderr


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_without_the_unsafe_path(way: str, tmp_path: Path) -> None:
    """`python -P` and PYTHONSAFEPATH leave the scripts' folders out, and the checkout with them."""
    flags = ("-P",) if way == "flag" else ()
    env = {} if way == "flag" else {"PYTHONSAFEPATH": "1"}
    for words in ((LAUNCH, "plan"), (str(CHECKOUT / "tp/reshard.py"), "--help")):
        assert run_in(tmp_path, *flags, *words, **env).returncode == 0
    result = run_in(tmp_path, *flags, LAUNCH, "--ranks", "2", "compile=false", *GENERATE, **env)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("safe", [False, True])
def test_a_program_has_the_path_that_python_gives_it(tmp_path: Path, safe: bool) -> None:
    program = tmp_path / "there" / "program.py"
    program.parent.mkdir()
    program.write_text("import json, sys\nprint(json.dumps([sys.path, sys.flags.safe_path]))\n")
    flags = ["-P"] if safe else []
    by_python = run_in(tmp_path, *flags, str(program))
    by_yoke = run_in(tmp_path, *flags, LAUNCH, "run", "--ranks", "1", str(program))
    assert json.loads(by_yoke.stdout) == json.loads(by_python.stdout)

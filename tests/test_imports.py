"""Imports point one way: server -> engine -> models -> tp -> kernels -> {comm, weights} -> torch;
all may import base."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
ROOMS = {
    "base": set(),
    "launcher": {"base"},
    "comm": {"base"},
    "kernels": {"base", "comm", "weights"},
    "weights": {"base"},
    "tp": {"base", "kernels", "comm", "weights"},
    "models": {"base", "tp", "kernels", "comm", "weights"},
    "quantize": {"base", "models", "tp", "kernels", "comm", "weights"},
    "engine": {"base", "models", "tp", "kernels", "comm", "weights"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_imports_only_those_below_it(room: str) -> None:
    files = list((CHECKOUT / room).rglob("*.py"))
    assert files
    for file in files:
        above = (imported(file) & set(ROOMS)) - ROOMS[room] - {room}
        assert not above, f"{file} imports {above}"


def test_the_launcher_needs_only_the_standard_library_and_psutil() -> None:
    for file in [*(CHECKOUT / "launcher").glob("*.py"), *(CHECKOUT / "base").glob("*.py")]:
        own = {"base"} if file.parent.name == "base" else {"base", "launcher", "psutil"}
        foreign = imported(file) - set(sys.stdlib_module_names) - own - {"__future__"}
        if file.name in ("draw.py", "doctor_view.py", "models_view.py"):
            foreign.discard("rich")  # what is drawn for people
        if file.name == "probe_torch.py":
            foreign.discard("torch")  # runs in a process of its own
        assert not foreign, f"{file} imports {foreign}"


def test_a_rank_does_not_import_the_compiler_before_it_compiles() -> None:
    code = "import sys, engine.rank, engine.session; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plan", "model=tiny", "weights=random"],
        ["--help"],
        ["models"],
        ["models", "--json"],
        ["quantize", "--help"],
        ["quantize", "model=tiny", "quant=int8"],
    ],
)
def test_the_command_does_not_import_torch(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv[1:] = {words!r}; import launch; launch.main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, capture_output=True)

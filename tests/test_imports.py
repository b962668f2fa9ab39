"""Imports point one way, between packages and inside them, and there is no way around that.

{engine, quantize -> reshard} -> models -> tp -> kernels -> {comm, weights} -> base; launcher -> base.
"""

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
    "reshard": {"base", "models", "tp", "kernels", "comm", "weights"},
    "models": {"base", "tp", "kernels", "comm", "weights"},
    "quantize": {"base", "reshard", "models", "tp", "kernels", "comm", "weights"},
    "engine": {"base", "models", "tp", "kernels", "comm", "weights"},
}
# `python -m tp.reshard` is what users type; the work is done in `reshard`.
DOORS = {"tp/reshard.py"}
# Modules loaded by name, each with its reason.
BY_NAME = {
    "comm/optional.py": "backends that may not be installed",
    "launcher/child.py": "starts what a run is for, without knowing it",
    "launcher/doctor/probe_torch.py": "runs in a process of its own, where torch may be missing",
}


def sources(folder: str) -> list[Path]:
    files = sorted((CHECKOUT / folder).rglob("*.py"))
    assert files
    return files


def module_of(file: Path) -> str:
    parts = file.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> set[str]:
    """The modules that a file names in any import but those for type checkers, dotted; of `from a
    import b` both a and a.b, since b may be a module."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return names


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_imports_only_those_below_it(room: str) -> None:
    for file in sources(room):
        if str(file.relative_to(CHECKOUT)) not in DOORS:
            above = (top(imported(file)) & set(ROOMS)) - ROOMS[room] - {room}
            assert not above, f"{file} imports {above}"


def test_there_are_no_import_circles(capsys: pytest.CaptureFixture[str]) -> None:
    files = {module_of(file): file for room in ROOMS for file in sources(room)}
    graph = {
        name: {other for other in imported(file) if other in files and other != name}
        for name, file in files.items()
        if str(file.relative_to(CHECKOUT)) not in DOORS
    }
    graph |= {module_of(CHECKOUT / door): set() for door in DOORS}
    found = circles(graph)
    with capsys.disabled():
        print(f"\nimport circles: {len(found)} among {len(graph)} modules", end="")
    assert not found


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]


def test_nothing_is_imported_by_name_but_what_has_a_reason() -> None:
    for room in ROOMS:
        for file in sources(room):
            if str(file.relative_to(CHECKOUT)) in BY_NAME:
                continue
            calls = [
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Call)
            ]
            around = {
                call
                for call in calls
                if call in ("importlib.import_module", "import_module", "__import__")
            }
            assert not around, f"{file} loads a module by name"


def test_tests_share_modules_and_not_their_conftest() -> None:
    """pytest imports a conftest.py by itself; what tests import is in a module beside it."""
    for file in sources("tests"):
        assert "tests.conftest" not in imported(file), f"{file}: import from tests.running"


def test_the_launcher_needs_only_the_standard_library_and_psutil() -> None:
    for file in [*sources("launcher"), *sources("base")]:
        own = {"base"} if file.parent.name == "base" else {"base", "launcher", "psutil"}
        foreign = top(imported(file)) - set(sys.stdlib_module_names) - own - {"__future__"}
        if file.name in ("draw.py", "view.py", "models_view.py", "progress.py"):
            foreign.discard("rich")  # what is drawn for people
        if file.name == "probe_torch.py":
            foreign.discard("torch")  # runs in a process of its own
        assert not foreign, f"{file} imports {foreign}"


def test_a_rank_does_not_import_the_compiler_before_it_compiles() -> None:
    code = "import sys, engine.generate, engine.chat; assert 'torch._dynamo' not in sys.modules"
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

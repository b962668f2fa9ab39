"""The collectives' C++ alone: ranks as threads over one region, under sanitizers and emulated.

`csrc/harness.cpp` makes random sequences of all operators and checks every result bit for bit; here it
is built in several ways and run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from comm.sources import COMM, FLAGS, SOURCE_DIR

HARNESS = Path(__file__).parent / "csrc/harness.cpp"
# What needs torch, and what needs processes.
LEFT_OUT = ("ops.cpp", "segment.cpp")
BUILDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "threads": ("-fsanitize=thread", "-O1"),
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"),
    "arm": ("-static",),
}
# Sequences per world: a build that is slow to run does fewer.
CASES = {"plain": 120, "threads": 50, "memory": 120, "arm": 20}
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "halt_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}

Run = Callable[..., str]


@pytest.fixture(scope="module", params=list(BUILDS))
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Builds the harness and gives a function that runs it and returns what it printed."""
    build: str = request.param
    folder = tmp_path_factory.mktemp(f"harness-{build}")
    compiler, before = tools(build)
    if build in ("threads", "memory"):
        before = sanitizer_runs(compiler, BUILDS[build], folder)
    program = compile_harness(compiler, build, folder)

    def run(*words: object) -> str:
        done = subprocess.run(
            [*before, str(program), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **ENVIRONMENT},
        )
        assert done.returncode == 0, f"{words}:\n{done.stdout[-1000:]}\n{done.stderr[-6000:]}"
        # A sanitizer that finds something in a program that ends well must not go unread.
        assert "Sanitizer" not in done.stderr, done.stderr[-6000:]
        return done.stdout

    run.build = build  # type: ignore[attr-defined]
    yield run
    shutil.rmtree(folder)  # a hundred megabytes of objects


def tools(build: str) -> tuple[str, list[str]]:
    """The compiler of a build, and what runs its programs."""
    if build == "arm" and platform.machine() != "aarch64":
        compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
        if compiler is None or emulator is None:
            pytest.skip("no Arm tools (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)")
        return compiler, [emulator]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "no C++ compiler (Debian: apt-get install g++)"
    return compiler, []


def sanitizer_runs(compiler: str, flags: tuple[str, ...], folder: Path) -> list[str]:
    """What a sanitized program needs before its name; skips the test where none can be made or run."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n")
    made = subprocess.run(
        [compiler, *flags, "-pthread", str(source), "-o", str(program)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"no library for {flags[0]}: {made.stderr.strip().splitlines()[-1]}")
    # Some kernels place memory at random where the thread sanitizer cannot have it.
    for before in ([], ["setarch", platform.machine(), "-R"]):
        if before and shutil.which(before[0]) is None:
            continue
        if subprocess.run([*before, str(program)], capture_output=True).returncode == 0:
            return before
    pytest.skip(f"a program with {flags[0]} does not run on this kernel")


def compile_harness(compiler: str, build: str, folder: Path) -> Path:
    for_x86 = build != "arm" and platform.machine() == "x86_64"
    commands, objects = [], []
    sources = [path for path in sorted(SOURCE_DIR.glob("*.cpp")) if path.name not in LEFT_OUT]
    for source in (HARNESS, *sources):
        own = COMM.x86_flags.get(source.name, ()) if for_x86 else ()
        objects.append(str(folder / f"{source.stem}.o"))
        flags = [*FLAGS, "-g1", *own, *BUILDS[build], f"-I{SOURCE_DIR}"]
        commands.append([compiler, *flags, "-c", str(source), "-o", objects[-1]])

    def call(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(call, commands))
    program = folder / "harness"
    call([compiler, "-pthread", *BUILDS[build], *objects, "-o", str(program)])
    return program


def test_random_sequences_of_all_operators(harness: Run) -> None:
    assert "worlds 1 to 8" in harness("random", 1, CASES[harness.build])  # type: ignore[attr-defined]


def test_other_sequences_without_instruction_sets(harness: Run) -> None:
    cases = CASES[harness.build] // 4  # type: ignore[attr-defined]
    assert "worlds 1 to 8" in harness("plain", 2, cases)


def test_sixty_four_ranks(harness: Run) -> None:
    assert "64 ranks" in harness("many", 3, CASES[harness.build] // 6)  # type: ignore[attr-defined]


def test_every_instruction_set_gives_the_same_bits(harness: Run) -> None:
    assert "instruction sets: base" in harness("kernels", 4)


def test_ranks_that_are_dead_late_or_do_something_else(harness: Run) -> None:
    assert "faults" in harness("faults")

"""Compile an extension of torch once, and find it again.

What: one shared library from a folder of sources, kept in the user's cache under a name made of
everything that it depends on (sources, flags, torch's version, compiler, machine), so that a stale
library is never loaded, and of no path, so that the same torch in another place needs no build. It is
loaded as code, so the folder must be one where nobody else can put a file (`base.private`).
Why not torch's own extension builder: it brings setuptools and ninja and several seconds of imports
for what is one compiler call. What is not here: SIMD variants (the source carries them itself).

`python -m comm.build` builds that of the collectives ahead of the first run.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from base.caches import BUILD_LOCK, EXTENSIONS
from base.compiler import find_compiler
from base.private import (
    NotPrivateError,
    cache_candidates,
    cache_folder,
    check_private_file,
    make_private,
)
from comm.errors import BuildError
from comm.sources import (
    BRIDGE,
    BRIDGE_DIR,
    COMM,
    Extension,
    read_level,
    sees_bridge,
    source_flags,
    sources,
)

_TICK_S = 0.5
_TIMEOUT_S = 900.0  # for one compiler, and for waiting on another process that builds


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is: `done` of `total` files after `seconds`. `expected_s`: what it took last
    time, or an estimate if `estimated`."""

    names: str
    done: int
    total: int
    seconds: float
    expected_s: float
    estimated: bool


ReportProgress = Callable[[BuildProgress], None]


def build_extension(extension: Extension = COMM) -> Path:
    """`build_extensions` of one."""
    return build_extensions([extension])[0]


def build_extensions(
    extensions: Sequence[Extension],
    report: ReportProgress = lambda progress: None,
    cpus: Collection[int] | None = None,
) -> list[Path]:
    """Return the paths of the compiled extensions, compiling first what is not there yet.

    A file lock lets one process build while others wait for its result; each of them reports the
    progress about twice a second. The compilers run on `cpus`, by default those of this thread. Raises
    BuildError when there is no C++ compiler, or it fails, or there is no place for the result.
    """
    compiler, folder = _compiler(), _folder()
    libraries = [folder / _file_name(compiler, extension) for extension in extensions]
    if all(map(_is_there, libraries)):
        return libraries
    with _build_lock(folder / BUILD_LOCK, report) as lock:
        missing = [
            (extension, library)
            for extension, library in zip(extensions, libraries, strict=True)
            if not _is_there(library)
        ]
        if missing:
            _build(compiler, missing, report, lock, cpus)
    return libraries


def built_extension(extension: Extension = COMM) -> Path | None:
    """The compiled extension, if there is one for this torch, compiler and source; builds nothing."""
    try:
        if not any(folder and (folder / EXTENSIONS).is_dir() for folder in cache_candidates()):
            return None  # checking creates no folder
        library = _folder() / _file_name(_compiler(), extension)
    except BuildError:
        return None
    return library if _is_there(library) else None


def _compiler() -> list[str]:
    try:
        words = find_compiler()
    except ValueError as error:
        raise BuildError(f"CXX={os.environ.get('CXX')!r} is not a command: {error}") from error
    if words is None:
        raise BuildError("no C++ compiler found (Debian: apt-get install g++)")
    return words


def _folder() -> Path:
    try:
        return make_private(cache_folder()[0] / EXTENSIONS)
    except OSError as error:
        raise BuildError(f"no folder for compiled code: {error}; set XDG_CACHE_HOME") from error


def _is_there(library: Path) -> bool:
    try:
        check_private_file(library)
    except (FileNotFoundError, NotPrivateError):  # what is not ours is replaced
        return False
    return True


def _file_name(compiler: list[str], extension: Extension) -> str:
    """What the library depends on, as a name; no path is among it."""
    digest = hashlib.sha256()
    level = read_level()
    for folder in (extension.source_dir, *([BRIDGE_DIR] if sees_bridge(extension) else [])):
        for source in sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h")):
            flags = [f for f in source_flags(source, extension, level) if not f.startswith("-I")]
            digest.update(f"{source.name} {' '.join(flags)}\0".encode() + source.read_bytes() + b"\0")
    digest.update(_version(tuple(compiler)))
    first_flag = next((i for i, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    git_version = getattr(torch.version, "git_version", "")
    for part in (
        torch.__version__, git_version, platform.machine(), *compiler[first_flag:], *_TORCH_FLAGS,
        *_LINK_FLAGS,
    ):  # fmt: skip
        digest.update(part.encode() + b"\0")
    return f"{extension.name}-{digest.hexdigest()[:16]}.so"


@functools.cache
def _version(compiler: tuple[str, ...]) -> bytes:
    try:
        return subprocess.run(
            [*compiler, "--version"], capture_output=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {' '.join(compiler)} does not run: {error}") from error


_TORCH_FLAGS = (
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    "-fopenmp",  # torch's parallel_for is a template over it
)
_LINK_FLAGS = ("-ltorch_cpu", "-lc10", "-fopenmp")


def _torch_paths() -> list[str]:
    root = Path(torch.__file__).parent
    # -isystem: warnings of torch's headers are not ours.
    return [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]


@contextmanager
def _build_lock(path: Path, report: ReportProgress) -> Iterator[IO[str]]:
    """Hold the lock `path`, in which the one who holds it writes how far it is."""
    deadline = time.monotonic() + _TIMEOUT_S
    with path.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if time.monotonic() > deadline:
                raise BuildError(f"another process has been building for {_TIMEOUT_S:.0f} s ({path})")
            lock.seek(0)
            with suppress(ValueError, TypeError):  # nothing is written yet, or half of it
                report(BuildProgress(**json.loads(lock.read())))
            time.sleep(_TICK_S)
        try:
            yield lock
        finally:
            lock.truncate(0)


def _build(
    compiler: list[str],
    missing: Sequence[tuple[Extension, Path]],
    report: ReportProgress,
    lock: IO[str],
    cpus: Collection[int] | None,
) -> None:
    folder = missing[0][1].parent
    names = " and ".join(extension.name for extension, _ in missing)
    record = folder / f"{names.replace(' ', '-')}.seconds"
    workers = len(cpus or os.sched_getaffinity(0))
    try:
        expected_s, estimated = float(record.read_text()), False
    except (OSError, ValueError):
        expected_s = sum(extension.core_seconds for extension, _ in missing) / workers
        estimated = True
    started = time.monotonic()

    def note(done: int, total: int) -> None:
        progress = BuildProgress(names, done, total, time.monotonic() - started, expected_s, estimated)
        lock.seek(0)
        lock.truncate()
        lock.write(json.dumps(asdict(progress)))
        lock.flush()
        report(progress)

    # Built beside its final name and moved there whole, so that a killed build leaves nothing loadable.
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as room:
        level = read_level()
        objects: dict[str, list[str]] = {}
        commands: dict[str, list[str]] = {}  # by what they make: the bridge is made once for all
        for extension, _ in missing:
            for source in sources(extension, level):
                made = f"{room}/{'' if source == BRIDGE else extension.name}-{source.stem}.o"
                objects.setdefault(extension.name, []).append(made)
                flags = source_flags(source, extension, level)
                if source == BRIDGE:
                    flags += [*_torch_paths(), *_TORCH_FLAGS]
                commands[made] = [*compiler, *flags, "-c", str(source), "-o", made]
        slowest_first = sorted(commands, key=lambda made: not Path(made).name.startswith("-bridge"))
        _run_all([commands[made] for made in slowest_first], workers, cpus, note)
        for extension, library in missing:
            built = Path(room) / library.name
            lib = Path(torch.__file__).parent / "lib"
            link = ["-shared", "-pthread", *objects[extension.name], "-o", str(built)]
            _run([*compiler, *link, f"-L{lib}", *_LINK_FLAGS])
            os.chmod(built, 0o700)  # whatever the umask says
            os.replace(built, library)
    record.write_text(f"{time.monotonic() - started:.1f}")


def _run_all(
    commands: Sequence[list[str]],
    workers: int,
    cpus: Collection[int] | None,
    note: Callable[[int, int], None],
) -> None:
    """Run the commands, `workers` at a time, and note how many are done, twice a second."""

    def spread() -> None:  # a child inherits this from the thread that starts it
        with suppress(OSError):
            os.sched_setaffinity(0, cpus or os.sched_getaffinity(0))

    with ThreadPoolExecutor(workers, initializer=spread) as pool:
        waiting = {pool.submit(_run, command) for command in commands}
        failed: Future[None] | None = None
        while waiting and failed is None:
            note(len(commands) - len(waiting), len(commands))
            done, waiting = wait(waiting, _TICK_S, FIRST_EXCEPTION)
            failed = next((future for future in done if future.exception()), None)
        pool.shutdown(wait=True, cancel_futures=True)
        if failed is not None:
            failed.result()
    note(len(commands), len(commands))


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {_TIMEOUT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed:\n{error.stderr[-4000:]}") from error


if __name__ == "__main__":
    try:
        print(build_extension())
    except BuildError as error:
        sys.exit(f"error: {error}")

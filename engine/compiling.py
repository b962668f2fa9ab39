"""The folder in which torch keeps compiled code from one start to the next, and its repair after
damage.

torch keeps compiled code on disk, under a key of everything that it depends on: the graph with all
shapes and dtypes (and so the model and the rank's layout), torch's version, the processor. The second
start of a job compiles nothing. But torch does not check the files: a truncated one (a full disk, a
crash) would make every later start fail. So after compiling, Yoke records the sizes and checksums of
the code (the seal). Before the next compiling it compares them; on a mismatch the code is dropped and
compiled again.

Yoke drops only files that the seal names, in folders that Yoke made, which contain its mark. A run that
compiles holds a lock on the mark; meanwhile no run drops code. A folder that the user chose, with
torch's own variable, is used unchanged: Yoke neither checks it, nor writes to it, nor removes anything.

Not here: how long this takes (docs/log.md).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from base.caches import COMPILED, COMPILED_MARK, COMPILERS
from base.compiler import find_compiler, program_of
from base.private import NotPrivateError, cache_folder, make_private

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable; a value that the user set is kept
_SEAL = "yoke-seal.json"
_WAIT_S = 300.0  # longest wait for other runs that compile, before damaged code can be dropped


@dataclass(frozen=True)
class CodeFolder:
    """The folder where torch keeps compiled code. `own`: Yoke made it. `remark`: why the folder that
    the user chose is not used, "" otherwise."""

    path: Path
    own: bool
    remark: str = ""


def use_cache_folder() -> CodeFolder:
    """Make torch keep compiled code in the user's cache folder, where it survives a reboot, and use the
    compiler that `$CXX` names. Must be called before anything is compiled. Raises OSError if there is
    no folder that only this user can write to."""
    # Imported here because it takes a second, which runs without compiling need not wait.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder, remark = None, ""
    # On import torch sets the variable to its default, a folder that all programs on the machine share.
    given = os.environ.get(VARIABLE)
    if given is not None and given != default_cache_dir():
        try:
            folder = CodeFolder(make_private(Path(given)), own=False)
        except NotPrivateError as error:
            remark = f"{VARIABLE} is not used: {error}"
    yoke, _ = cache_folder()
    if folder is None:
        folder = _own_folder(yoke / f"{COMPILED}{torch.__version__}")
    os.environ[VARIABLE] = str(folder.path)
    _use_compiler(yoke)
    return replace(folder, remark=remark)


def _own_folder(path: Path) -> CodeFolder:
    """Create the folder with its mark, or use an existing one. Yoke never drops files in a folder
    without a mark."""
    if not path.exists():
        begun = make_private(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))
        (begun / COMPILED_MARK).write_text(
            "Yoke made this folder, and may remove what its seal names.\n"
        )
        try:
            begun.rename(path)
        except OSError:  # another rank was first
            (begun / COMPILED_MARK).unlink()
            begun.rmdir()
    real = make_private(path)
    return CodeFolder(real, own=(real / COMPILED_MARK).is_file())


def _use_compiler(yoke: Path) -> None:
    """Support a `$CXX` of several words: torch takes it for the name of one program. So write a script
    that runs the words. Its name ends in the compiler's, by which torch distinguishes gcc and clang."""
    try:
        words = find_compiler()
    except ValueError:
        return  # torch reports the error
    if words is None or len(words) == 1:
        return
    from torch._inductor import config

    script = f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'
    name = f"{hashlib.sha256(script.encode()).hexdigest()[:12]}-{Path(program_of(words)).name}"
    program = make_private(yoke / COMPILERS) / name
    temporary = program.with_name(f"{name}.{uuid.uuid4().hex}")
    temporary.write_text(script)
    temporary.chmod(0o700)
    temporary.replace(program)
    config.cpp.cxx = (None, str(program))


@contextmanager
def compiling(folder: CodeFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Wraps compiling, on one rank of each machine: drops damaged code before, and seals the folder
    after. `say` prints a line for the user."""
    if not folder.own:
        yield
        return
    with (folder.path / COMPILED_MARK).open("r+") as lock:
        if _is_damaged(folder.path):
            say(_drop(folder.path, lock))
        _lock(lock, fcntl.LOCK_SH, _WAIT_S)
        yield
        # If another run is still compiling, it may be writing a file; it will seal the folder later.
        if _lock(lock, fcntl.LOCK_EX, 0):
            _seal(folder.path)


def _lock(file: IO[str], kind: int, wait_s: float) -> bool:
    """Take a lock, or convert the one that is held; returns False if others still hold theirs after
    `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.1)


def _is_damaged(folder: Path) -> bool:
    """Whether a file that the seal names is missing or has changed, or the seal itself is
    unreadable."""
    try:
        wanted = _read_seal(folder)
        return any(mark is not None and _fingerprint(folder / name) != mark for name, mark in wanted)
    except FileNotFoundError as error:
        return Path(error.filename) != folder / _SEAL  # no seal: no run has finished compiling here
    except (OSError, ValueError):
        return True


def _drop(folder: Path, lock: IO[str]) -> str:
    """Remove the files that the seal names, unless another run uses them; returns a line that says what
    was done."""
    if not _lock(lock, fcntl.LOCK_EX, _WAIT_S):
        return f"the compiled code in {folder} is damaged, but another run is using it: it is kept"
    if not _is_damaged(folder):
        return f"another run has dropped the damaged code in {folder}"
    try:
        names = [name for name, _ in _read_seal(folder)]
    except (OSError, ValueError):
        # Without a seal it is unknown which files to remove. So move all of them aside, unused.
        aside = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}")
        aside.mkdir(mode=0o700)
        for entry in folder.iterdir():
            if entry.name != COMPILED_MARK:
                entry.rename(aside / entry.name)
        return f"the list of the compiled code in {folder} was damaged; its files were moved to {aside}"
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()
    (folder / _SEAL).unlink()
    above = {parent for name in names for parent in Path(name).parents if parent.name}
    for parent in sorted(above, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty
            (folder / parent).rmdir()
    return f"the compiled code in {folder} was damaged and is dropped"


def _seal(folder: Path) -> None:
    """Record the files of the folder. A folder that cannot be written to stays unsealed."""
    with suppress(OSError):
        files = {
            str(path.relative_to(folder)): _fingerprint(path) if path.suffix in _KEPT else None
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink() and not path.name.startswith("yoke-")
        }
        temporary = folder / f"{_SEAL}.{uuid.uuid4().hex}"
        temporary.write_text(json.dumps(files))
        temporary.replace(folder / _SEAL)


# Suffixes of code files, whose names derive from their contents. Locks and cache entries that refer to
# code have no checksum: torch rewrites them at times, and skips entries that it cannot read. They are
# removed together with the code.
_KEPT = (".so", ".cpp", ".py", ".h", ".cubin")


def _read_seal(folder: Path) -> list[tuple[str, list[int] | None]]:
    """The names of files in the folder, and the fingerprints of those that are code (None for others).
    Raises ValueError for a seal that is not such a list, or that names a file outside the folder."""
    seal = json.loads((folder / _SEAL).read_bytes())
    if not isinstance(seal, dict):
        raise ValueError("not an object")
    for name, mark in seal.items():
        inside = folder / name
        if os.path.realpath(inside) != str(inside) or inside == folder or not _is_mark(mark):
            raise ValueError(f"{name}: {mark}")
    return list(seal.items())


def _is_mark(mark: object) -> bool:
    return mark is None or (isinstance(mark, list) and all(isinstance(x, int) for x in mark))


def _fingerprint(path: Path) -> list[int]:
    data = path.read_bytes()
    return [len(data), zlib.crc32(data)]

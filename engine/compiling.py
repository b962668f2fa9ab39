"""Where compiled code is kept from one start to the next, and what to do about damage there.

torch keeps compiled code on disk by everything it depends on: the graph with all shapes and dtypes,
so the model and the rank's layout, torch's version, the processor. The second start of a job compiles
nothing. But it believes what it finds: a file that was cut short (a full disk, a crash) would end
every later start. So after compiling, the sizes and checksums of its code are written down (the seal),
and before the next compiling they are compared; what does not agree is dropped, and compiled again.

Dropping is for folders that Yoke made, which have its mark, and for files that the seal names. While a
run compiles, it holds a lock on the mark, and nobody drops. A folder that the user chose, by torch's
own variable, is used as it is: neither looked through, nor written to by Yoke, nor removed.

Not here: how long that takes (docs/log.md).
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

from base.compiler import find_compiler, program_of
from base.private import NotPrivateError, cache_folder, make_private

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own; one that is set already is kept
_SEAL = "yoke-seal.json"
_MARK = "yoke-made-this"
_WAIT_S = 300.0  # for another run that compiles, before what is damaged can be dropped


@dataclass(frozen=True)
class CodeFolder:
    """Where torch keeps compiled code; `own` is a folder that Yoke made. `remark`: why it is not
    the one that the user chose, if so."""

    path: Path
    own: bool
    remark: str = ""


def use_cache_folder() -> CodeFolder:
    """Have torch keep compiled code in the user's cache folder, where it outlives the machine's next
    start, and call the compiler that `$CXX` names. Must be called before anything is compiled. Raises
    OSError where there is no folder that only this user can write to."""
    # Here, since it takes a second, which who compiles nothing need not wait.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder, remark = None, ""
    # torch sets its own choice, which all programs on the machine share, as soon as it is imported.
    given = os.environ.get(VARIABLE)
    if given is not None and given != default_cache_dir():
        try:
            folder = CodeFolder(make_private(Path(given)), own=False)
        except NotPrivateError as error:
            remark = f"{VARIABLE} is not used: {error}"
    yoke, _ = cache_folder()
    if folder is None:
        folder = _own_folder(yoke / f"inductor-torch-{torch.__version__}")
    os.environ[VARIABLE] = str(folder.path)
    _use_compiler(yoke)
    return replace(folder, remark=remark)


def _own_folder(path: Path) -> CodeFolder:
    """Make it with its mark, or find it. One without a mark is used, but it is not Yoke's to empty."""
    if not path.exists():
        begun = make_private(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))
        (begun / _MARK).write_text("Yoke made this folder, and may remove what its seal names.\n")
        try:
            begun.rename(path)
        except OSError:  # another rank was first
            (begun / _MARK).unlink()
            begun.rmdir()
    real = make_private(path)
    return CodeFolder(real, own=(real / _MARK).is_file())


def _use_compiler(yoke: Path) -> None:
    """torch takes `$CXX` for the name of one program. Where it holds more words, give it a program that
    calls them; its name ends in the compiler's, by which torch tells gcc from clang."""
    try:
        words = find_compiler()
    except ValueError:
        return  # torch says so
    if words is None or len(words) == 1:
        return
    from torch._inductor import config

    script = f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'
    name = f"{hashlib.sha256(script.encode()).hexdigest()[:12]}-{Path(program_of(words)).name}"
    program = make_private(yoke / "compilers") / name
    temporary = program.with_name(f"{name}.{uuid.uuid4().hex}")
    temporary.write_text(script)
    temporary.chmod(0o700)
    temporary.replace(program)
    config.cpp.cxx = (None, str(program))


@contextmanager
def compiling(folder: CodeFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Around the time in which code is compiled into the folder, or found there, on one rank of a
    machine: what is damaged is dropped before, and what is there is sealed after."""
    if not folder.own:
        yield
        return
    with (folder.path / _MARK).open("r+") as lock:
        if _is_damaged(folder.path):
            say(_drop(folder.path, lock))
        _lock(lock, fcntl.LOCK_SH, _WAIT_S)
        yield
        # Another run may be in the middle of a file: then that one seals it, when it has compiled.
        if _lock(lock, fcntl.LOCK_EX, 0):
            _seal(folder.path)


def _lock(file: IO[str], kind: int, wait_s: float) -> bool:
    """Take a lock, or change the one that is held; False if others do not let go of theirs."""
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
    """Whether a file that the seal names is missing or not as it was, or nobody can read the seal."""
    try:
        wanted = _read_seal(folder)
        return any(mark is not None and _fingerprint(folder / name) != mark for name, mark in wanted)
    except FileNotFoundError as error:
        return Path(error.filename) != folder / _SEAL  # without a seal nothing was finished here
    except (OSError, ValueError):
        return True


def _drop(folder: Path, lock: IO[str]) -> str:
    """Remove the files that the seal names, unless another run uses them; what was done, in a line."""
    if not _lock(lock, fcntl.LOCK_EX, _WAIT_S):
        return f"the compiled code in {folder} is damaged, but another run is using it: it is kept"
    if not _is_damaged(folder):
        return f"another run has dropped the damaged code in {folder}"
    try:
        names = [name for name, _ in _read_seal(folder)]
    except (OSError, ValueError):
        # Nobody knows what is to be removed; so nothing is, and nothing of it is used.
        aside = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}")
        aside.mkdir(mode=0o700)
        for entry in folder.iterdir():
            if entry.name != _MARK:
                entry.rename(aside / entry.name)
        return (
            f"the list of the compiled code in {folder} was damaged; what was there is now in {aside}"
        )
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
    """Write down what the folder holds. One that cannot be written to is left unsealed."""
    with suppress(OSError):
        files = {
            str(path.relative_to(folder)): _fingerprint(path) if path.suffix in _KEPT else None
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink() and not path.name.startswith("yoke-")
        }
        temporary = folder / f"{_SEAL}.{uuid.uuid4().hex}"
        temporary.write_text(json.dumps(files))
        temporary.replace(folder / _SEAL)


# Code, whose name says what is in it. Not locks, nor the entries that lead to code: torch writes those
# anew at times, and passes over one that it cannot read. They go when the code goes.
_KEPT = (".so", ".cpp", ".py", ".h", ".cubin")


def _read_seal(folder: Path) -> list[tuple[str, list[int] | None]]:
    """The names of files in the folder, and the fingerprints of those that are code. Raises ValueError
    for a seal that is no such list, or that names a file elsewhere."""
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

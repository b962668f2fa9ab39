"""Where compiled code is kept from one start to the next, and what to do about damage there.

torch keeps compiled code on disk by everything it depends on: the graph with all shapes and dtypes,
so the model and the rank's layout, torch's version, the processor. The second start of a job compiles
nothing. But it believes what it finds: a file that was cut short (a full disk, a crash) would end
every later start. So after compiling, the sizes and checksums of its code are written down, and
before the next compiling they are compared; what does not agree is dropped, and compiled again.

Not here: how long that takes (docs/log.md).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import torch

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own; one that is set already is kept
_SEAL = "yoke-seal.json"


def use_cache_folder() -> Path:
    """Have torch keep compiled code in the user's cache folder, where it outlives the machine's next
    start, and return that folder. Must be called before anything is compiled."""
    # Here, since it takes a second, which who compiles nothing need not wait.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets its own choice, which all programs on the machine share, as soon as it is imported.
    if os.environ.get(VARIABLE) in (None, default_cache_dir()):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[VARIABLE] = str(home / "yoke" / f"compiled-torch-{torch.__version__}")
    return Path(os.environ[VARIABLE])


def drop_if_damaged(folder: Path) -> bool:
    """Compare the folder's files with its seal. Where one is missing or not as it was, remove them all
    and return True. Nothing else may be compiling."""
    seal = folder / _SEAL
    try:
        wanted: dict[str, list[int]] = json.loads(seal.read_bytes())
        found = {name: _fingerprint(folder / name) for name in wanted}
    except FileNotFoundError as error:
        if Path(error.filename) == seal:
            return False  # nothing was finished here
        found = None
    except (OSError, ValueError, TypeError):
        found = None
    if found is not None and found == wanted:
        return False
    # Away at once, so that a rank of another run meets a missing folder and not half of one.
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    return True


def seal(folder: Path) -> None:
    """Write down what the folder holds, after all of it has been compiled. A folder that cannot be
    written to is left unsealed."""
    with suppress(OSError):
        files = {
            str(path.relative_to(folder)): _fingerprint(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix in _KEPT and path.stat().st_size
        }
        temporary = folder / f"{_SEAL}.{uuid.uuid4().hex}"
        temporary.write_text(json.dumps(files))
        temporary.replace(folder / _SEAL)


# Code, whose name says what is in it. Not locks, nor the entries that lead to code: torch writes those
# anew at times, and passes over one that it cannot read.
_KEPT = (".so", ".cpp", ".py", ".h", ".cubin")


def _fingerprint(path: Path) -> list[int]:
    data = path.read_bytes()
    return [len(data), zlib.crc32(data)]

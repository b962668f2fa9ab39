"""The small files that go with a model's weights, copied into what is made of it.

What: config, tokenizer, chat templates and licenses beside the weights, as bytes. Why a module of its
own: a folder from elsewhere may hold a link named LICENSE to somebody's private file, and the output
may be given away. So a file counts only where it really lies in the model's folder, or in the store of
the hub that the folder is a snapshot of. Not here: which of them are written anew.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from base.errors import InputError
from weights.checkpoint import Checkpoint

PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "params.json",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "LICENSE*",
    "USE_POLICY*",
)
FILE_LIMIT = 128 << 20  # bytes; the largest tokenizer.json known to us has 35 MB
TOTAL_LIMIT = 256 << 20


def companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Names to contents. A GGUF file stands alone: others beside it are not its own. Raises InputError
    for a file that is too large, or lies elsewhere."""
    if checkpoint.format == "gguf" and not checkpoint.path.is_dir():
        return {}
    folder = checkpoint.folder
    paths = {path for pattern in PATTERNS for path in folder.glob(pattern)}
    contents: dict[str, bytes] = {}
    for path in sorted(path for path in paths if path.is_file()):
        contents[path.name] = _read(path, places_of(folder))
        if sum(map(len, contents.values())) > TOTAL_LIMIT:
            raise InputError(
                f"{folder}: the files beside the weights have more than {TOTAL_LIMIT >> 20} MiB "
                "together; remove those that do not belong to the model"
            )
    return contents


def places_of(folder: Path) -> tuple[Path, ...]:
    """Where the files of a model's folder may really lie: in it, and for `snapshots/REVISION` of a hub
    cache in the `blobs` of the same repository."""
    real = folder.resolve()
    return (real, real.parent.parent / "blobs") if real.parent.name == "snapshots" else (real,)


def _read(path: Path, places: tuple[Path, ...]) -> bytes:
    try:
        with path.open("rb") as file:
            # What was opened is asked, and not the path, which may have become another file since.
            lies_at = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
            if not any(lies_at.is_relative_to(place) for place in places):
                raise InputError(
                    f"{path} is a link to {lies_at}, outside the model's folder, and would be copied "
                    "into the output; put a copy in its place if it is the model's, else remove it"
                )
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is no regular file; remove it")
            content = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); see its owner and mode") from error
    if len(content) > FILE_LIMIT:
        raise InputError(
            f"{path} has more than {FILE_LIMIT >> 20} MiB, which no file of its kind needs; remove it"
        )
    return content

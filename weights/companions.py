"""The small files beside a model's weights, which are copied into an output made from the model.

They are config, tokenizer, chat templates and licenses, read as bytes. This is a module of its own
for safety: a downloaded folder may hold a link named LICENSE to a private file, and the output may be
published. So a file is copied only if it really is in the model's folder, or in the blob store of
the hub cache that the folder is a snapshot of. What is not here: which of the files are rewritten.
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
    """The contents of the files, by name. Empty for a single GGUF file, which contains its metadata:
    files beside it may belong to other models. Raises InputError for a file that is too large, or that
    is a link to a file outside the model's folder."""
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
                "in total; remove those that do not belong to the model"
            )
    return contents


def places_of(folder: Path) -> tuple[Path, ...]:
    """The folders in which the files of a model may really lie: the model's own folder and, for
    `snapshots/REVISION` of a hub cache, the `blobs` folder of the same repository."""
    real = folder.resolve()
    return (real, real.parent.parent / "blobs") if real.parent.name == "snapshots" else (real,)


def _read(path: Path, places: tuple[Path, ...]) -> bytes:
    try:
        with path.open("rb") as file:
            # Check the open file, not the path: the path may have been replaced since.
            lies_at = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
            if not any(lies_at.is_relative_to(place) for place in places):
                raise InputError(
                    f"{path} is a link to {lies_at}, outside the model's folder, and would be copied "
                    "into the output; replace the link with a copy if it belongs to the model, or "
                    "remove it"
                )
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is not a regular file; remove it")
            content = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); check its owner and mode"
        ) from error
    if len(content) > FILE_LIMIT:
        raise InputError(
            f"{path} has more than {FILE_LIMIT >> 20} MiB, the limit for files of this kind; remove it"
        )
    return content

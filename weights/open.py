"""Open a checkpoint of any format: the only module that imports all readers.

It is above `weights.formats`, whose readers do not depend on each other. What is not here: which
files a path means (`weights.locate`).
"""

from __future__ import annotations

from pathlib import Path

from weights.checkpoint import Checkpoint
from weights.locate import locate


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any supported format: a file, an index, or the folder of a model, as
    `weights.locate` finds them. Raises InputError if files are missing or damaged, or of a format that
    is not supported."""
    source = locate(path)
    # Imported here: each reader imports a library that only its own format needs.
    if source.form == "gguf":
        from weights.formats.gguf_io import open_gguf

        return open_gguf(source)
    if source.form == "safetensors":
        from weights.formats.safetensors_io import open_safetensors

        return open_safetensors(source)
    if source.form == "meta":
        from weights.formats.meta_io import open_meta

        return open_meta(source)
    if source.form == "yoke":
        from weights.formats.yoke_io import open_yoke

        return open_yoke(source.folder)
    from weights.formats.pickle_io import open_pickle

    return open_pickle(source)

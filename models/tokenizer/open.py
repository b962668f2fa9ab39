"""Opens the tokenizer that comes with a checkpoint, for every kind of file that holds one."""

from __future__ import annotations

from models.tokenizer.codec import TextCodec
from models.tokenizer.from_folder import folder_codec
from models.tokenizer.from_gguf import gguf_codec
from weights.checkpoint import Checkpoint


def load_codec(checkpoint: Checkpoint) -> TextCodec:
    """The tokenizer of a checkpoint. Raises InputError if it is missing, damaged or not supported."""
    if checkpoint.format == "gguf":
        return gguf_codec(checkpoint.path, checkpoint.config)
    return folder_codec(checkpoint.folder, checkpoint.config)

"""The files beside the weights: config.json, the tokenizer, and other small files of the model."""

from __future__ import annotations

import json
from typing import Any

from models.config import HEAD, ModelConfig
from models.config_json import to_hf
from models.tokenizer.files import tokenizer_files
from weights.checkpoint import Checkpoint
from weights.companions import companions

_OWN = ("config.json", "params.json")  # config.json is rewritten; it includes Meta's params.json


def small_files(
    checkpoint: Checkpoint, config: ModelConfig, quantization: dict[str, Any]
) -> dict[str, bytes]:
    """The contents of the small files, by name. The metadata of a GGUF file are converted to the files
    of a Hugging Face folder. Raises InputError if that is not possible."""
    if checkpoint.format == "gguf":
        family = str(checkpoint.config.get("general.architecture", "llama"))
        keys = to_hf(config, family, str(checkpoint.path))
        files = tokenizer_files(checkpoint.path, checkpoint.config)
    else:
        keys = dict(checkpoint.config)
        if HEAD in checkpoint.entries and not config.tie_embeddings:
            keys["tie_word_embeddings"] = False  # the config may tie a head that differs
        files = {name: data for name, data in companions(checkpoint).items() if name not in _OWN}
    keys["quantization_config"] = quantization
    files["config.json"] = (json.dumps(keys, indent=2, ensure_ascii=False) + "\n").encode()
    return files

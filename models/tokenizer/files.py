"""Writes a GGUF file's tokenizer as the files of a Hugging Face folder: tokenizer.json and its
companions. `models.tokenizer.from_folder` reads them back as the same tokenizer, with one exception
that tokenizer.json cannot express: SentencePiece adds a space even before a text that begins with one.
The written tokenizer, like transformers, does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from models.tokenizer.codec import Ends
from models.tokenizer.from_gguf import gguf_pipeline


def tokenizer_files(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of the files, by name, for the tokenizer in the metadata `config` of the GGUF file
    at `path`. Raises InputError for a tokenizer that is damaged or not supported."""
    found = gguf_pipeline(path, config)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **found.special}
    # Templates that cannot be read are left out.
    templates = {
        name: template for name, template in found.chat_templates.items() if isinstance(template, str)
    }
    if templates.keys() == {"default"}:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    _put_around(found.tokenizer, found.ends)
    files = {"tokenizer.json": found.tokenizer.to_str(pretty=True) + "\n"}
    files["tokenizer_config.json"] = _json(settings)
    if found.stop_tokens:
        files["generation_config.json"] = _json({"eos_token_id": sorted(found.stop_tokens)})
    return {name: text.encode() for name, text in files.items()}


def _put_around(tokenizer: Tokenizer, ends: Ends) -> None:
    """Make the pipeline itself add the tokens that the model expects around a text."""
    before, after = ([tokenizer.id_to_token(i) for i in side] for side in (ends.before, ends.after))
    if before or after:
        names = dict(zip([*before, *after], [*ends.before, *ends.after], strict=True))
        template = [*before, "$A", *after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=list(names.items())
        )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

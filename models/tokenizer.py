"""Text to tokens and back: tokenizers from GGUF metadata or `tokenizer.json`, and chat templates.

The work is done by the `tokenizers` library; what is here builds its pipeline from a GGUF file's
vocabulary. What is not here: SentencePiece vocabularies, and pre-tokenizers not listed below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from weights.checkpoint import Checkpoint
from weights.errors import InputError

_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# By the name that GGUF files carry in `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _byte_level(use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_LLAMA_3_SPLIT), "isolated"), _byte_level(use_regex=False)]
    ),
}
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer and what a model's files say of its use.

    `encode(text, whole)` gives token ids; `whole` adds the tokens that the model wants around a text
    (a first one, mostly), which a chat template has already written. `stream()` gives a function that
    takes one id at a time and returns the text that has become certain, never half a character.
    """

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[list[int]], str]
    stream: Callable[[], Callable[[int], str]]
    stop_tokens: frozenset[int] = frozenset()
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)


def load_codec(checkpoint: Checkpoint) -> TextCodec:
    """The tokenizer that comes with a checkpoint. Raises InputError."""
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint.config, checkpoint.path)
    return _from_folder(checkpoint.folder, checkpoint.config)


def byte_codec(vocab_size: int) -> TextCodec:
    """For random weights, which have no tokenizer: a byte is a token, and a token that is not a byte
    is shown by its number."""

    def show(token: int) -> str:
        return chr(token) if 32 <= token < 127 else f"<{token}>"

    return TextCodec(
        encode=lambda text, whole: [byte % vocab_size for byte in text.encode()],
        decode=lambda tokens: "".join(map(show, tokens)),
        stream=lambda: show,
    )


def apply_chat_template(codec: TextCodec, message: str) -> str:
    """`message` as the user's turn of a conversation, ready for the model's answer.

    Templates are programs from a file that may not be trusted: they run in jinja2's sandbox. Raises
    InputError when there is no template or it fails.
    """
    if codec.chat_template is None:
        raise InputError("chat=true: this model has no chat template; leave chat=false")

    def raise_exception(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(codec.chat_template).render(
            messages=[{"role": "user", "content": message}],
            add_generation_prompt=True,
            **codec.special,
        )
    except TemplateError as error:
        raise InputError(f"the model's chat template cannot be used: {error}") from error


def _codec(
    tokenizer: Tokenizer,
    stop_tokens: frozenset[int],
    chat_template: str | None,
    special: Mapping[str, str],
    bos: int | None,
) -> TextCodec:
    def encode(text: str, whole: bool) -> list[int]:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=whole).ids
        return [bos, *tokens] if whole and bos is not None else tokens

    def stream() -> Callable[[int], str]:
        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(tokenizer, token) or ""

    return TextCodec(encode, tokenizer.decode, stream, stop_tokens, chat_template, special)


def _from_gguf(config: Mapping[str, Any], path: Path) -> TextCodec:
    kind, pre = config.get("tokenizer.ggml.model"), config.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; supported: "
            f"'gpt2' with {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    try:
        tokens: list[str] = config["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in config["tokenizer.ggml.merges"]]
        types = config["tokenizer.ggml.token_type"]
        bpe = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            # Llama 3 takes a word that is a token as it is, whatever its merges.
            ignore_merges=pre == "llama-bpe",
        )
    # The library raises plain exceptions for merges that do not fit the vocabulary.
    except Exception as error:
        raise InputError(f"{path}: the embedded tokenizer is damaged: {error}") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    # Special first: both calls keep the ids that the vocabulary already gives them.
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    names = {name: config.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    stop = frozenset(index for name in ("eos", "eot") if isinstance(index := names[name], int))
    special = {
        f"{name}_token": tokens[index] for name, index in names.items() if isinstance(index, int)
    }
    # Without the key, llama.cpp adds a first token for Llama 3 and for no other of these.
    add_bos = config.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = names["bos"] if add_bos else None
    return _codec(tokenizer, stop, config.get("tokenizer.chat_template"), special, bos)


def _from_folder(folder: Path, config: Mapping[str, Any]) -> TextCodec:
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    # The library raises a plain Exception for a file that is missing or malformed.
    except Exception as error:
        raise InputError(f"{file} cannot be read as a tokenizer: {error}") from error
    settings = _optional_json(folder / "tokenizer_config.json")
    eos = _optional_json(folder / "generation_config.json").get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    stop = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    special = {
        name: token if isinstance(token, str) else token["content"]
        for name in ("bos_token", "eos_token")
        if (token := settings.get(name))
    }
    template = settings.get("chat_template")
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        template = template_file.read_text(encoding="utf-8")
    # tokenizer.json's own post-processor adds the first token where the model wants one.
    return _codec(tokenizer, stop, template if isinstance(template, str) else None, special, None)


def _optional_json(path: Path) -> dict[str, Any]:
    from weights.safetensors_io import read_json

    return read_json(path) if path.exists() else {}

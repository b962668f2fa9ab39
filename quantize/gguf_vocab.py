"""A model's tokenizer as the metadata of a GGUF file (`tokenizer.*`).

Two kinds are written: byte-level BPE ("gpt2"), with the name of the pre-tokenizer that splits texts in
the same way, and SentencePiece's BPE ("llama"), whose scores follow from the order of the merges. The
result is read back and must give the same tokens for a few texts; otherwise it is refused.

What is not here: Unigram, WordPiece, and vocab.json with merges.txt.

Sources: the GGUF specification's section on `tokenizer.ggml.*`, and what llama.cpp's `llama-vocab.cpp`
reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from base.errors import InputError
from models.tokenizer.byte_level import SPLITTINGS
from models.tokenizer.codec import TextCodec
from models.tokenizer.from_gguf import gguf_codec
from models.tokenizer.open import load_codec
from models.tokenizer.spm import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_spm
from weights.checkpoint import Checkpoint
from weights.files import read_json
from weights.texts import without_mark

Keys = dict[str, Any]
_UNUSED, _BYTE = 5, 6  # types of tokens, beside those of SentencePiece's pieces
# Texts that tokenizers split differently: contractions, digits, blanks, cases, scripts, marks.
PROBES = (
    "The capital of France is Paris, and it's old.\n\nI'VE 12345 things; we'll  see\t3.14 of x1y2.",
    "def f(x):\n    return {'a': [x ** 2]}  # ok\r\n\n\ncamelCase ALLCAPS USA/UK a_b__c $+<=>^~|`!!!",
    "naïve café e\u0301 größer Привет, こんにちは 你好世界。 שלום مرحبا हिन्दी ٣٤٥ ²³¼ 🙂🇫🇷 \u00a0|",
)
# The pre-tokenizers in the order of preference: several names stand for the same one.
_NAMES = (
    "llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "dbrx", "command-r", "falcon",
    "qwen35", "default",
)  # fmt: skip


def vocabulary_of(checkpoint: Checkpoint, vocab_size: int) -> Keys:
    """The keys `tokenizer.*` for a model whose embedding has `vocab_size` rows. Raises InputError if
    there is no tokenizer, or none that such a file can describe."""
    codec = load_codec(checkpoint)
    folder, source = checkpoint.folder, str(checkpoint.path)
    if (folder / "tokenizer.json").exists():
        content = json.loads(without_mark((folder / "tokenizer.json").read_bytes()))
        keys, tokens, types = _from_json(content, source)
    elif (folder / "tokenizer.model").exists():
        keys, tokens, types = _from_spm(folder, source)
    else:
        raise _refused(source, "it is neither a tokenizer.json nor a SentencePiece model")
    _add_declared(folder, tokens, types)
    if len(tokens) > vocab_size:
        raise _refused(
            source, f"it has {len(tokens)} tokens, and the model a vocabulary of {vocab_size}"
        )
    for i in range(len(tokens), vocab_size):
        tokens.append(f"[PAD{i}]")
        types.append(_UNUSED)
        if "tokenizer.ggml.scores" in keys:
            keys["tokenizer.ggml.scores"].append(0.0)
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    keys |= _special(codec, tokens, source) | _templates(codec)
    _check(checkpoint, codec, keys, source)
    return keys


def _refused(source: str, why: str) -> InputError:
    return InputError(
        f"{source}: its tokenizer cannot be written as GGUF: {why}; write a folder instead: quant=int8 "
        "or quant=int4-g32"
    )


def _from_json(content: Mapping[str, Any], source: str) -> tuple[Keys, list[str], list[int]]:
    """Keys, tokens and types of a tokenizer.json."""
    model = content.get("model") or {}
    kind = model.get("type", "BPE")
    if kind != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _refused(source, f"its kind is {kind!r}, and only BPE is supported")
    vocab: dict[str, int] = dict(model["vocab"])
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    vocab |= {token["content"]: i for i, token in added.items()}
    tokens = _in_order(vocab, source)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    spm = bool(model.get("byte_fallback"))
    types = [NORMAL] * len(tokens)
    for i, token in added.items():
        types[i] = CONTROL if token.get("special") else USER_DEFINED
    if not spm:
        keys: Keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _splitting_name(content, bool(model.get("ignore_merges")), source),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        }
        return keys, tokens, types
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = _BYTE
        elif token == model.get("unk_token"):
            types[i] = UNKNOWN
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(tokens, merges),
        "tokenizer.ggml.add_space_prefix": _has_prefix(content),
    }
    return keys, tokens, types


def _in_order(vocab: Mapping[str, int], source: str) -> list[str]:
    """Tokens by id; ids without a token, which no text has, get names."""
    size = max(vocab.values(), default=-1) + 1
    if len(set(vocab.values())) != len(vocab) or size > 2 * len(vocab) + 1:
        raise _refused(source, "its ids are not 0, 1, 2, ...")
    tokens = [f"[PAD{i}]" for i in range(size)]
    for token, i in vocab.items():
        tokens[i] = token
    return tokens


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores: a piece that is merged earlier has a higher one. Pieces that no merge
    makes come last."""
    rank: dict[str, int] = {}
    for pair in merges:
        rank.setdefault("".join(pair), len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _has_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a space is added before a text."""
    found = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in found or '"prepend_scheme": "first"' in found or '"always"' in found


def _splitting_name(content: Mapping[str, Any], whole_words: bool, source: str) -> str:
    """The name of the pre-tokenizer that splits the probes as this tokenizer.json does."""
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    parts = {**content, **empty, "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(parts))

    def words(
        normalizer: normalizers.Normalizer | None, splitter: pre_tokenizers.PreTokenizer | None
    ) -> list[list[str]]:
        found = []
        for text in PROBES:
            text = text if normalizer is None else normalizer.normalize_str(text)
            pieces = [] if splitter is None else splitter.pre_tokenize_str(text)
            found.append([piece for piece, _ in pieces])
        return found

    wanted = words(tokenizer.normalizer, tokenizer.pre_tokenizer)
    fitting = []
    for name in _NAMES:
        splitting = SPLITTINGS[name]
        normalizer = normalizers.NFC() if splitting.nfc else None
        if words(normalizer, pre_tokenizers.Sequence(splitting.steps())) == wanted:
            fitting.append(name)
    # A model that takes whole words as tokens needs a name that says so, if there is one.
    fitting.sort(key=lambda name: SPLITTINGS[name].whole_words != whole_words)
    if not fitting:
        raise _refused(
            source, f"none of the known pre-tokenizers splits texts as it does ({', '.join(_NAMES)})"
        )
    return fitting[0]


def _from_spm(folder: Path, source: str) -> tuple[Keys, list[str], list[int]]:
    """Keys, tokens and types of a tokenizer.model."""
    found = read_spm(folder / "tokenizer.model")
    if found.unigram or found.charsmap:
        raise _refused(source, "it is a Unigram model, or normalizes texts")
    keys: Keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": list(found.scores),
        "tokenizer.ggml.add_space_prefix": found.dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": found.collapse,
    }
    return keys, list(found.pieces), list(found.types)


def _add_declared(folder: Path, tokens: list[str], types: list[int]) -> None:
    """Add the tokens that tokenizer_config.json adds after the vocabulary, and its names and types for
    others."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    for key, entry in sorted(
        (settings.get("added_tokens_decoder") or {}).items(), key=lambda e: int(e[0])
    ):
        i = int(key)
        if i == len(tokens):
            tokens.append(entry["content"])
            types.append(NORMAL)
        if i < len(tokens):
            tokens[i] = entry["content"]
            if types[i] != UNKNOWN:
                types[i] = CONTROL if entry.get("special") else USER_DEFINED


def _special(codec: TextCodec, tokens: Sequence[str], source: str) -> Keys:
    """The ids of special tokens, and whether a first and a last one belong to a text."""
    ids = {token: i for i, token in enumerate(tokens)}
    named = {
        name.removesuffix("_token"): ids[token] for name, token in codec.special.items() if token in ids
    }
    stops = sorted(codec.stop_tokens)
    eos = named.get("eos", stops[0] if stops else None)
    keys: Keys = {}
    for name, key in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")):
        if name in named:
            keys[f"tokenizer.ggml.{key}_token_id"] = named[name]
    if eos is not None:
        keys["tokenizer.ggml.eos_token_id"] = eos
    for key, stop in zip(("eot", "eom"), [stop for stop in stops if stop != eos], strict=False):
        keys[f"tokenizer.ggml.{key}_token_id"] = stop
    whole, bare = codec.encode("a", True), codec.encode("a", False)
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]
    if before not in ([], [named.get("bos")]) or after not in ([], [eos]):
        raise _refused(source, f"it puts the tokens {before} and {after} around a text")
    keys["tokenizer.ggml.add_bos_token"] = bool(before)
    keys["tokenizer.ggml.add_eos_token"] = bool(after)
    return keys


def _templates(codec: TextCodec) -> Keys:
    found = {name: text for name, text in codec.chat_templates.items() if isinstance(text, str)}
    keys = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text
        for name, text in found.items()
    }
    others: Any = [name for name in found if name != "default"]
    return keys | ({"tokenizer.chat_templates": others} if others else {})


def _check(checkpoint: Checkpoint, codec: TextCodec, keys: Keys, source: str) -> None:
    """Raise InputError unless the keys are read as a tokenizer that gives the same tokens."""
    written = gguf_codec(checkpoint.path, keys)
    for text in PROBES:
        if written.encode(text, True) != codec.encode(text, True):
            raise _refused(source, f"its tokens for {text[:20]!r}... would change")

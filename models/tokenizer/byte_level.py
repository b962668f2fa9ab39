"""Byte-level BPE: GPT-2's alphabet for bytes, pre-tokenizers by their names in GGUF files, and Meta's
tiktoken files (Llama 3).

Sources: `bytes_to_unicode` of OpenAI's gpt-2; the `tokenizer.json` of the models named below, and
llama.cpp's names for them in `llama-vocab.cpp`; `tokenizer.py` of Meta's llama-models.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from base.errors import InputError
from models.tokenizer.divisions import divisions
from weights.files import DAMAGE, HEADER_LIMIT, damaged, regular_file
from weights.texts import lines_of

FORM = "a tiktoken vocabulary"

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str, letters: str = r"\p{L}") -> str:
    """Contractions, words with one preceding character, digits, runs of other characters, blanks."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*{_BLANKS}"
    )


def _o200k(digits: str, ending: str) -> str:
    """As `_cl100k`, but words are also cut where lower case changes to upper case."""
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}[{upper}]*[{lower}]+{ending}|{first}[{upper}]+[{lower}]*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_BLANKS}"
    )


@dataclass(frozen=True)
class Splitting:
    """How a family splits a text into words before BPE.

    `nfc`: the text is first normalized to NFC. `whole_words`: a word that is a token becomes that
    token, whatever its merges. `first_token`: whether a text gets a first token (BOS) if the file does
    not say.
    """

    steps: Callable[[], list[PreTokenizer]]
    nfc: bool = False
    whole_words: bool = False
    first_token: bool = False


def _byte_level(use_regex: bool) -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _regex(*patterns: str) -> Callable[[], list[PreTokenizer]]:
    """Steps that split by one pattern after another, then map to bytes."""
    return lambda: [
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
        _byte_level(use_regex=False),
    ]


def _digits() -> list[PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]


def _falcon() -> list[PreTokenizer]:
    # In this order, digits are searched in the letters that stand for bytes, as in the model.
    return [
        pre_tokenizers.Punctuation("contiguous"),
        _byte_level(use_regex=True),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]


_LLAMA_3 = Splitting(_regex(_cl100k(r"\p{N}{1,3}")), whole_words=True, first_token=True)
_CL100K = Splitting(_regex(_cl100k(r"\p{N}{1,3}")))
_QWEN_2 = Splitting(_regex(_cl100k(r"\p{N}")), nfc=True)
_PLAIN = Splitting(lambda: [_byte_level(use_regex=True)])
_STARCODER = Splitting(_digits)

# By the name in `tokenizer.ggml.pre`. Where these differ from llama.cpp or from transformers' reading
# of GGUF (neither applies NFC for Qwen and Command R), they follow the models' own tokenizer.json.
SPLITTINGS = {
    # llama.cpp's fallback for files without a name; transformers uses GPT-2's pattern there.
    "default": Splitting(_regex(r"[\p{P}$+<=>^~|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "dbrx": _CL100K,  # also Phi 4
    "smaug-bpe": _CL100K,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "qwen35": Splitting(_regex(_cl100k(r"\p{N}", r"\p{L}\p{M}")), nfc=True),
    "tekken": Splitting(_regex(_o200k(r"\p{N}", "")), whole_words=True, first_token=True),
    "gpt-4o": Splitting(_regex(_o200k(r"\p{N}{1,3}", f"{_CONTRACTION}?"))),  # also Phi 4 mini
    "falcon": Splitting(_falcon),
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,  # also Granite
    "command-r": Splitting(_digits, nfc=True),
}


def build_bytes(
    vocab: dict[str, int], merges: list[tuple[str, str]], splitting: Splitting
) -> Tokenizer:
    """The pipeline of a vocabulary that is spelled in GPT-2's alphabet. Raises the library's own errors
    for a vocabulary that it cannot use."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=splitting.whole_words))
    if splitting.nfc:
        composed: Normalizer = normalizers.NFC()
        tokenizer.normalizer = composed
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting.steps())
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# Meta's names of the 256 tokens after the vocabulary, as of Llama 3.1; the others are reserved.
# (Llama 3 names those that it does not use as reserved too; the ids are the same.)
_META_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_META_COUNT, META_FIRST, META_STOP = 256, 0, (1, 8, 9)


def meta_special(base: int) -> dict[int, AddedToken]:
    """The special tokens of Llama 3 by id, after a vocabulary of `base` tokens."""
    reserved = iter(range(_META_COUNT))
    names = [
        _META_SPECIAL.get(i) or f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(_META_COUNT)
    ]
    return {base + i: AddedToken(name, special=True, normalized=False) for i, name in enumerate(names)}


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins like tiktoken's: base64 of a token, a space, its rank. Raises InputError
    for a file that cannot be read."""
    regular_file(path, "a tokenizer")
    try:
        with path.open("rb") as opened:
            line = opened.read(4096).split(b"\n")[0].split(b" ")
        return (
            len(line) == 2
            and line[1].strip().isdigit()
            and bool(base64.b64decode(line[0], validate=True))
        )
    except OSError as error:
        raise damaged(path, "a tokenizer", error) from error
    except ValueError:
        return False


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids. Raises InputError for a damaged file."""
    size = regular_file(path, FORM)
    if size > HEADER_LIMIT:
        raise InputError(f"{path} has {size} bytes; no {FORM[2:]} is larger than {HEADER_LIMIT}")
    ranks: dict[bytes, int] = {}
    try:
        for line in lines_of(path.read_bytes()):
            if line:
                token, rank = line.split(b" ")
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
            raise ValueError("its ranks are not 0, 1, 2, ... of different tokens")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("it lacks some of the 256 single bytes")
    except DAMAGE as error:
        raise damaged(path, FORM, error) from error
    return ranks


def build_tiktoken(ranks: dict[bytes, int]) -> Tokenizer:
    """The pipeline of Llama 3's vocabulary. tiktoken merges the two neighbors whose union has the
    lowest rank. Here the unions are written as a list of merges, in that order."""
    pairs = divisions(sorted(ranks, key=ranks.__getitem__))
    merges = [(spell(left), spell(right)) for left, right in pairs]
    return build_bytes({spell(token): rank for token, rank in ranks.items()}, merges, _LLAMA_3)


@functools.cache
def _alphabet() -> list[str]:
    """The letter of each byte: the byte's own character if it is printable, else the next from U+0100
    on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in seen else chr(256 + next(others)) for byte in range(256)]


def spell(token: bytes) -> str:
    """Bytes in GPT-2's alphabet."""
    letters = _alphabet()
    return "".join(letters[byte] for byte in token)

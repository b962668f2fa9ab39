"""SentencePiece vocabularies, from a `tokenizer.model` or a GGUF file, as a pipeline of the
`tokenizers` library.

The file is a protobuf message. Only the few fields that matter are read, with a parser here: so neither
the sentencepiece nor the protobuf package is needed, and lengths are checked before they are used.
BPE with byte fallback (Llama 1 and 2, Mistral, Gemma) and Unigram (T5) are supported.

What is not here: word and character models.

Sources: `sentencepiece_model.proto` and `bpe_model.cc` of Google's sentencepiece.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from base.errors import InputError
from models.tokenizer.divisions import divisions
from models.tokenizer.limits import charsmap_growth, check_added
from weights.files import DAMAGE, HEADER_LIMIT, damaged, regular_file

FORM = "a SentencePiece model"
SPACE = "\u2581"  # stands for a space in the vocabulary
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces; GGUF has the same numbers
_UNIGRAM, _BPE = 1, 2
# The keys of a piece, and of its fields, in the file: number and wire type in one byte.
_PIECE, _TEXT, _SCORE, _TYPE = 0x0A, 0x0A, 0x15, 0x18


@dataclass(frozen=True)
class SpmVocabulary:
    """The contents of a SentencePiece model. The index of a piece is its id; id -1 means no such token.

    `dummy_prefix`: a space is added before a text. `after_special`: a space is also added after a
    special token inside a text (Hugging Face's `legacy`). `collapse`: other spaces at the ends are
    removed, and runs of spaces become one. `charsmap`: the compiled normalization, empty for none.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    unigram: bool = False
    byte_fallback: bool = True
    dummy_prefix: bool = True
    after_special: bool = False
    collapse: bool = False
    charsmap: bytes = b""
    unk: int = 0
    bos: int = 1
    eos: int = 2
    pad: int = -1

    @property
    def doubled_space(self) -> bool:
        """Whether a text that begins with a space needs one more before it is encoded.

        SentencePiece adds a space before every text. The library's Metaspace, and so transformers 5,
        adds none to a text that already begins with a space. The model was trained with SentencePiece's
        behavior, and decoding removes one space again.
        """
        return self.dummy_prefix and not (self.after_special or self.unigram or self.collapse)


def build_spm(vocabulary: SpmVocabulary) -> Tokenizer:
    """The pipeline of a vocabulary, without first and last tokens. Raises ValueError, or the library's
    own errors, for a vocabulary that cannot be used."""
    named = [i for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
    pieces = list(vocabulary.pieces)
    for i in named:
        if vocabulary.types[i] == USER_DEFINED:
            # User-defined runs of spaces are matched before the text's spaces are replaced by SPACE.
            pieces[i] = pieces[i].replace(SPACE, " ")
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) != len(pieces):
        raise ValueError("a piece occurs twice")
    if charsmap_growth(vocabulary.charsmap) > 1:
        raise ValueError("its normalization replaces a character by too long a text")
    if not all(map(math.isfinite, vocabulary.scores)):
        raise ValueError("a score is not a finite number")
    unk = vocabulary.unk if 0 <= vocabulary.unk < len(pieces) else None
    if vocabulary.unigram:
        scored = list(zip(pieces, vocabulary.scores, strict=True))
        model: models.Model = models.Unigram(scored, unk_id=unk, byte_fallback=vocabulary.byte_fallback)
    else:
        model = models.BPE(
            vocab=ids,
            merges=_merges(pieces, vocabulary.scores, vocabulary.types),
            unk_token=None if unk is None else pieces[unk],
            fuse_unk=True,
            byte_fallback=vocabulary.byte_fallback,
        )
    tokenizer = Tokenizer(model)
    _add_spaces(tokenizer, vocabulary)
    # SentencePiece never matches control tokens in a text; those of a chat template must match.
    added = [
        AddedToken(pieces[i], special=vocabulary.types[i] != USER_DEFINED, normalized=False)
        for i in named
        if pieces[i]
    ]
    check_added(token.content for token in added)
    tokenizer.add_tokens(added)
    return tokenizer


def _add_spaces(tokenizer: Tokenizer, vocabulary: SpmVocabulary) -> None:
    """Add the steps that replace spaces by SPACE, with the added prefix, and the inverse for
    decoding."""
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.collapse:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if vocabulary.unigram:
        scheme = "always" if vocabulary.dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
    elif vocabulary.dummy_prefix and not vocabulary.after_special:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        if vocabulary.dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if vocabulary.byte_fallback:
        decoding.append(decoders.ByteFallback())
    decoding.append(decoders.Fuse())
    if vocabulary.dummy_prefix:
        decoding.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(decoding)


def _merges(
    pieces: list[str], scores: tuple[float, ...], types: tuple[int, ...]
) -> list[tuple[str, str]]:
    """Every split of a piece into two others, best score first.

    SentencePiece merges the two neighbors whose union has the best score. So all pairs that make the
    same piece have equal priority there. Here they have an order, which matters only if they overlap
    (as in transformers). Only normal pieces are merged or result from merges: byte tokens are not.
    """
    falling = [-score for score in scores]
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    normal.sort(key=falling.__getitem__)  # equal scores stay in the order of their ids
    ordered = [pieces[i] for i in normal]
    return divisions(ordered)


def read_spm(path: Path) -> SpmVocabulary:
    """Read a SentencePiece model. Raises InputError if it is damaged or not supported."""
    size = regular_file(path, FORM)
    if size > HEADER_LIMIT:
        raise InputError(f"{path} has {size} bytes; no {FORM[2:]} is larger than {HEADER_LIMIT}")
    try:
        return _parse(path, path.read_bytes())
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(path, FORM, error) from error


def _parse(path: Path, content: bytes) -> SpmVocabulary:
    pieces, scores, types, rest = _first_pieces(content)
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content, rest):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            pieces.append(_bytes(piece.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            types.append(_integer(piece.get(3, NORMAL)))
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    kind = _integer(trainer.get(3, _UNIGRAM))
    if kind not in (_UNIGRAM, _BPE):
        raise InputError(
            f"{path} is a SentencePiece model of kind {kind}; BPE (2) and Unigram (1) are supported"
        )
    if _integer(trainer.get(24, 0)):
        raise InputError(f"{path} treats spaces as suffixes of words, which is not supported")
    return SpmVocabulary(
        tuple(pieces),
        tuple(scores),
        tuple(types),
        unigram=kind == _UNIGRAM,
        byte_fallback=bool(_integer(trainer.get(35, 0))),
        dummy_prefix=bool(_integer(normalizer.get(3, 1))),
        collapse=bool(_integer(normalizer.get(4, 1))),
        charsmap=_bytes(normalizer.get(2, b"")),
        unk=_integer(trainer.get(40, 0)),
        bos=_integer(trainer.get(41, 1)),
        eos=_integer(trainer.get(42, 2)),
        pad=_integer(trainer.get(43, -1)),
    )


def _first_pieces(content: bytes) -> tuple[list[str], list[float], list[int], int]:
    """The pieces, scores and types at the beginning of a file that are written as sentencepiece writes
    them: a text, then a score, then a type unless it is NORMAL, with lengths of one byte. Also returns
    where the first other field begins. This is a faster `_fields` for nearly all of a vocabulary."""
    starts = []
    at, end = 0, len(content) - 9  # 9: the bytes of an empty text, a score and their keys and lengths
    while at <= end and content[at] == _PIECE and 7 <= (size := content[at + 1]) < 128:
        starts.append(at)
        at += 2 + size
    codes, first = np.frombuffer(content, np.uint8), np.array(starts, np.int64)
    stops = first + 2 + codes[first + 1]
    scores = first + 4 + codes[first + 3]  # where the field of the score begins
    typed = stops == scores + 7
    last = np.minimum(stops, len(content)) - 2  # where the field of the type begins, if there is one
    good = (stops <= len(content)) & (typed | (stops == scores + 5)) & (codes[first + 2] == _TEXT)
    good &= codes[np.minimum(scores, last)] == _SCORE
    good &= ~typed | ((codes[last] == _TYPE) & (codes[last + 1] < 128))
    count = len(good) if good.all() else int(good.argmin())
    rest = starts[count] if count < len(starts) else at
    first, scores, typed, last = (array[:count] for array in (first, scores, typed, last))
    numbers = codes[scores[:, None] + np.arange(1, 5)].view("<f4")[:, 0]
    types = np.where(typed, codes[last + 1], NORMAL)
    parts = zip((first + 4).tolist(), scores.tolist(), strict=True)
    texts = [content[begin:stop].decode("utf-8") for begin, stop in parts]
    return texts, numbers.tolist(), types.tolist(), rest


def _fields(message: bytes, at: int = 0) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and values of a protobuf message's fields, from byte `at` on. Raises ValueError for
    invalid lengths or types."""
    end = len(message)
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind} at byte {at}")
        if length > end - at:
            raise ValueError(f"a field at byte {at} takes {length} bytes, {end - at} are left")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number of more than ten bytes before byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field holds a number instead of a string or a message")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a field holds a string instead of a number")
    return value - (1 << 64) if value >> 63 else value  # int32 is written as 64 bits

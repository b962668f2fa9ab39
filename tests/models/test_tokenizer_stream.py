"""Text that appears token by token is the text of all tokens, and never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from base.errors import InputError
from models.tokenizer.codec import TextCodec, byte_codec, make_codec
from models.tokenizer.open import load_codec
from tests.models.pre_tokenizers import LLAMA_3, byte_level, patterns
from tests.models.vocabularies import TEXTS, train_bytes, train_spm
from weights.checkpoint import Checkpoint

WORDS = [
    "ab",
    "a</w>",
    "##c",
    "\u2581d",
    "\u2581",
    "e.",
    "' s",
    "<0x41>",
    "<0xE4>",
    "\ufffd",
    "é",
    "##",
]


def pieces_of(decoder: decoders.Decoder) -> TextCodec:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "ab"))
    tokenizer.decoder = decoder
    tokenizer.add_tokens([AddedToken("<special>", special=True), AddedToken("<plain>", special=False)])
    return make_codec(tokenizer)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TextCodec, int]]:
    """Codecs of every kind of decoder, with a number of ids that goes beyond their vocabulary."""
    folder = tmp_path_factory.mktemp("spm")
    train_spm(folder / "tokenizer.model")
    return {
        "bytes": (make_codec(train_bytes(patterns(LLAMA_3), None)), 540),
        "sentencepiece": (load_codec(Checkpoint(folder, "x", {}, {})), 750),
        "metaspace": (pieces_of(decoders.Metaspace()), 16),
        "word piece": (pieces_of(decoders.WordPiece()), 16),
        "suffixes": (pieces_of(decoders.BPEDecoder()), 16),
        "byte fallback alone": (pieces_of(decoders.ByteFallback()), 16),
    }


KINDS = ["bytes", "sentencepiece", "metaspace", "word piece", "suffixes", "byte fallback alone"]


def streamed(codec: TextCodec, tokens: list[int]) -> list[str]:
    stream = codec.stream()
    pieces = [stream(token) for token in tokens]
    return [*pieces, stream(None)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_stream_as_their_text(kind: str, codecs: dict[str, tuple[TextCodec, int]]) -> None:
    codec, size = codecs[kind]
    # Half of them are bytes and special tokens, which are what can go wrong.
    ids = st.integers(0, size - 1) | st.integers(0, min(size, 260) - 1)

    @settings(max_examples=250, deadline=None)
    @given(st.lists(ids, max_size=30))
    def check(tokens: list[int]) -> None:
        assert "".join(streamed(codec, tokens)) == codec.decode(tokens)

    check()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_come_whole_and_as_soon_as_they_are_certain(
    kind: str, codecs: dict[str, tuple[TextCodec, int]]
) -> None:
    codec, _ = codecs[kind]
    for text in TEXTS:
        tokens = codec.encode(text, False)
        pieces = streamed(codec, tokens)
        assert "".join(pieces) == codec.decode(tokens)
        assert not any("\ufffd" in piece for piece in pieces)
    plain = "The capital of France is Paris, isn't it"
    pieces = streamed(codec, codec.encode(plain, False))
    assert "".join(pieces) == plain
    assert all(pieces[1:-1]) and pieces[-1] == ""  # nothing waits (a first space is dropped)


def test_half_a_character_waits_for_the_other_half(codecs: dict[str, tuple[TextCodec, int]]) -> None:
    codec, _ = codecs["bytes"]
    tokens = codec.encode("\U0001f9ff", False)
    assert len(tokens) > 2  # the vocabulary does not have it
    assert streamed(codec, tokens) == [""] * (len(tokens) - 1) + ["\U0001f9ff", ""]
    assert streamed(codec, tokens[:2]) == ["", "", "\ufffd"]
    # Bytes that are no character are shown when what follows makes it certain.
    letter = codec.encode("a", False)
    assert "".join(streamed(codec, tokens[:2] + letter)[:-1]) == "\ufffda"


def test_a_run_of_byte_tokens_waits_for_its_end(codecs: dict[str, tuple[TextCodec, int]]) -> None:
    codec, _ = codecs["sentencepiece"]
    run = codec.encode("\U0001f9ff", False)[1:]  # behind the space in front
    letter = codec.encode("<s>a", False)[-1]
    special = codec.encode("</s>", False)
    assert len(run) == 4
    assert streamed(codec, [letter, *run, letter]) == ["a", "", "", "", "", "\U0001f9ffa", ""]
    assert streamed(codec, [letter, *run]) == ["a", "", "", "", "", "\U0001f9ff"]
    # A special token is left out, so the run goes on behind it; one byte too many spoils all of it.
    invalid = [letter, *run, *special, run[0]]
    assert streamed(codec, invalid)[:-1] == ["a"] + [""] * 6
    assert "".join(streamed(codec, invalid)) == codec.decode(invalid) == "a" + "\ufffd" * 5


def test_two_streams_do_not_share_what_they_hold(codecs: dict[str, tuple[TextCodec, int]]) -> None:
    codec, _ = codecs["bytes"]
    first, second = codec.encode("é", False), codec.encode("\U0001f9ff", False)
    one, two = codec.stream(), codec.stream()
    shown = [one(first[0]), two(second[0])]
    rest = ["".join(map(one, first[1:])), "".join(map(two, second[1:]))]
    assert [a + b for a, b in zip(shown, rest, strict=True)] == ["é", "\U0001f9ff"]
    # An ended stream begins anew.
    assert two(None) == "" and "".join(map(two, second)) == "\U0001f9ff"


def test_what_is_no_text_is_refused(codecs: dict[str, tuple[TextCodec, int]]) -> None:
    encoders: list[Callable[[str, bool], list[int]]] = [codec.encode for codec, _ in codecs.values()]
    for encode in [*encoders, byte_codec(300).encode]:
        with pytest.raises(InputError, match=r"'\\udcff' at position 1 is not a character"):
            encode("a\udcff", True)


def test_a_long_text_streams_in_time_that_grows_with_it(tmp_path: Path) -> None:
    """Windows stay short: each step decodes a few tokens, not all of them."""
    tokenizer = train_bytes(byte_level(True), None)
    codec = make_codec(tokenizer)
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return codec.decode(tokens)

    from models.tokenizer.codec import _stream

    step = _stream(decode, frozenset(), lambda token: False)
    tokens = codec.encode(" ".join(TEXTS[:4] * 20), False)
    assert "".join(map(step, tokens)) + step(None) == codec.decode(tokens)
    assert len(tokens) > 1000 and longest < 20

"""Stop texts end an answer exactly, and nothing that may belong to one is shown too early."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from engine.texts import text_stream
from models.tokenizer.codec import byte_codec

CODEC = byte_codec(256)


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    feed = text_stream(CODEC, stops)
    shown, ended, fed = "", False, 0
    for token in text.encode():
        piece, ended = feed(token)
        shown += piece
        fed += 1
        # What is shown stays, and what is held back could still become a stop text.
        held = text[len(shown) : fed]
        assert text.startswith(shown)
        assert ended or not held or any(stop.startswith(held) for stop in stops)
        if ended:
            break
    shown += feed(None)[0]
    ends = [i + len(stop) for stop in stops for i in range(len(text)) if text.startswith(stop, i)]
    assert ended == bool(ends)
    if ends:
        seen = text[: min(ends)]  # as far as the first stop text that is complete
        assert fed == len(seen)
        assert shown == seen[: min(i for i in map(seen.find, stops) if i >= 0)]
    else:
        assert shown == text


def test_half_a_character_is_not_shown(gguf: Path) -> None:
    from models.tokenizer.open import load_codec
    from weights.open import open_checkpoint

    codec = load_codec(open_checkpoint(gguf))
    text = "né🙂 fin. Then more"
    feed = text_stream(codec, ["fin."])
    pieces = [feed(token) for token in codec.encode(text, False)]
    assert "".join(piece for piece, _ in pieces).strip() == "né🙂"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece, _ in pieces)
    assert pieces[-1] == ("", True)

"""Decodes tokens to text as they come, and finds stop strings. Runs on rank 0 only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.tokenizer.codec import TextCodec

Feed = Callable[[int | None], tuple[str, bool]]


def text_stream(codec: TextCodec, stops: Sequence[str]) -> Feed:
    """Returns a function that is called with an answer's tokens one by one, and with None at the end.

    It returns the text that may be shown, and whether the answer ends here because one of `stops` is
    complete. The stop string and everything after it are not shown. Text that may be the beginning of a
    stop string is held back until that is decided.
    """
    decode = codec.stream()
    held = ""
    over = False

    def feed(token: int | None) -> tuple[str, bool]:
        nonlocal held, over
        if over:
            return "", True
        held += decode(token)
        found = [place for place in (held.find(stop) for stop in stops) if place >= 0]
        if found:
            over = True
            return held[: min(found)], True
        keep = 0 if token is None else max((_overlap(held, stop) for stop in stops), default=0)
        shown, held = held[: len(held) - keep], held[len(held) - keep :]
        return shown, False

    return feed


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))

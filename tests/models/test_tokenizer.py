"""Tokens and text against transformers' reading of the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.tokenizer import TextCodec, apply_chat_template, byte_codec, load_codec
from weights.checkpoint import open_checkpoint
from weights.errors import InputError

TEXTS = [
    "The capital of France is",
    "  two  spaces\tand\ttabs\n\n\nlines \r\n",
    "don't we'll I'VE 12345 3.14159 x1y2",
    "def f(x):\n    return {'a': [x ** 2]}  # ok",
    "naïve café, größer, Привет, こんにちは世界, 你好",
    "👩‍👩‍👧 🇫🇷 👍🏽 \u200d\ufe0f",
    "\x00\x01\x7f\u2028\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "",
]


@pytest.fixture(scope="module")
def codec(gguf: Path) -> TextCodec:
    return load_codec(open_checkpoint(gguf))


@pytest.fixture(scope="module")
def reference(gguf: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_text_are_those_of_transformers(text: str, codec: TextCodec, reference) -> None:
    tokens = codec.encode(text)
    assert tokens == reference.encode(text)
    assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_the_stream_is_the_text_and_never_half_a_character(text: str, codec: TextCodec) -> None:
    tokens = codec.encode(text)
    stream = codec.stream()
    pieces = [stream(token) for token in tokens]
    assert "".join(pieces) == codec.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_chat_template_is_rendered_as_transformers_renders_it(codec, reference) -> None:
    wanted = reference.apply_chat_template(
        [{"role": "user", "content": "Hello {{ 1 }}"}],
        tokenize=False,
        add_generation_prompt=True,
        chat_template=codec.chat_template,
    )
    assert apply_chat_template(codec, "Hello {{ 1 }}") == wanted


def test_a_template_cannot_leave_its_sandbox() -> None:
    def refused(template: str | None, match: str) -> None:
        codec = TextCodec(lambda text: [], lambda tokens: "", lambda: str, frozenset(), template)
        with pytest.raises(InputError, match=match):
            apply_chat_template(codec, "x")

    refused("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe")
    refused("{{ raise_exception('roles must alternate') }}", "roles must alternate")
    refused("{% for", "cannot be used")
    refused(None, "no chat template")


def test_bytes_stand_in_where_there_is_no_tokenizer() -> None:
    codec = byte_codec(512)
    assert codec.encode("hé") == [104, 195, 169]
    assert codec.decode([104, 300]) == "h<300>"
    assert max(byte_codec(50).encode("zebra")) < 50

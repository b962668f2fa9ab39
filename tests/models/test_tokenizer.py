"""Tokens and text against transformers' reading of the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from models.tokenizer import TextCodec, apply_chat_template, byte_codec, load_codec
from weights.checkpoint import Checkpoint, open_checkpoint
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
    tokens = codec.encode(text, True)
    assert tokens == reference.encode(text)
    assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_the_stream_is_the_text_and_never_half_a_character(text: str, codec: TextCodec) -> None:
    tokens = codec.encode(text, True)
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
        codec = TextCodec(lambda text, whole: [], lambda tokens: "", lambda: str, frozenset(), template)
        with pytest.raises(InputError, match=match):
            apply_chat_template(codec, "x")

    refused("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe")
    refused("{{ raise_exception('roles must alternate') }}", "roles must alternate")
    refused("{% for", "cannot be used")
    refused(None, "no chat template")


def test_a_folder_of_hugging_face_is_read_with_its_first_token_and_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "hi": 1, "there": 2, "</s>": 3}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<s>"},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    codec = load_codec(Checkpoint(tmp_path, "safetensors", {}, {"eos_token_id": 5}))
    assert codec.encode("hi there", True) == [0, 1, 2]
    # The template has written the first token: it must not come twice.
    assert codec.encode(apply_chat_template(codec, "hi"), False) == [0, 1]
    assert codec.stop_tokens == {3, 7}
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load_codec(Checkpoint(tmp_path, "safetensors", {}, {}))


def test_bytes_stand_in_where_there_is_no_tokenizer() -> None:
    codec = byte_codec(512)
    assert codec.encode("hé", True) == [104, 195, 169]
    assert codec.decode([104, 300]) == "h<300>"
    assert max(byte_codec(50).encode("zebra", True)) < 50

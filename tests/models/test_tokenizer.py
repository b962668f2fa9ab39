"""The embedded model's tokens, text and chat against transformers' reading of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from models.chat import apply_chat_template
from models.tokenizer.codec import TextCodec, byte_codec
from models.tokenizer.open import load_codec
from tests.models.vocabularies import TEXTS
from weights.checkpoint import Checkpoint
from weights.open import open_checkpoint


@pytest.fixture(scope="module")
def codec(gguf: Path) -> TextCodec:
    return load_codec(open_checkpoint(gguf))


@pytest.fixture(scope="module")
def reference(gguf: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # As the model's own tokenizer.json has it; transformers reads GGUF's "smollm" as GPT-2's, which
    # joins digits that are not ASCII.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_text_are_those_of_transformers(text: str, codec: TextCodec, reference: Any) -> None:
    tokens = codec.encode(text, True)
    assert tokens == reference.encode(text)
    assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


def test_every_special_token_is_found_in_a_text(codec: TextCodec, reference: Any) -> None:
    special = [token.content for token in reference.added_tokens_decoder.values()]
    assert len(special) == 17
    text = "x".join(special) + "".join(reversed(special))
    tokens = codec.encode(text, True)
    assert tokens == reference.encode(text) and len(tokens) == 17 * 3 - 1
    assert codec.decode(tokens) == "x" * 16
    # Ids beyond the vocabulary (a padded matrix has such rows) are no text.
    assert codec.decode([*tokens, 10**6]) == "x" * 16


@pytest.mark.parametrize("text", TEXTS)
def test_the_stream_is_the_text_and_never_half_a_character(text: str, codec: TextCodec) -> None:
    tokens = codec.encode(text, True)
    stream = codec.stream()
    pieces = [*map(stream, tokens), stream(None)]
    assert "".join(pieces) == codec.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_conversation_is_rendered_and_encoded_as_transformers_does(
    codec: TextCodec, reference: Any
) -> None:
    talk = [
        {"role": "user", "content": "Hello {{ 1 }}"},
        {"role": "assistant", "content": " Hi <|im_end|>\n"},
        {"role": "user", "content": "é"},
    ]
    for messages in (talk[:1], talk, [{"role": "system", "content": "Be kind"}, *talk]):
        text = apply_chat_template(codec, messages)
        options = {"add_generation_prompt": True, "chat_template": codec.chat_templates["default"]}
        assert text == reference.apply_chat_template(messages, tokenize=False, **options)
        tokens = reference.apply_chat_template(messages, return_dict=False, **options)
        assert codec.encode(text, False) == tokens


def test_the_first_token_that_a_template_writes_does_not_come_twice(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "hi": 1, "there": 2, "</s>": 3}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    codec = load_codec(Checkpoint(tmp_path, "safetensors", {}, {}))
    assert codec.encode("hi there", True) == [0, 1, 2]
    text = apply_chat_template(codec, [{"role": "user", "content": "hi"}])
    assert codec.encode(text, False) == [0, 1]


def test_bytes_stand_in_where_there_is_no_tokenizer() -> None:
    codec = byte_codec(512)
    assert codec.encode("hé", True) == [104, 195, 169]
    assert codec.decode([104, 300]) == "h<300>"
    stream = codec.stream()
    assert [stream(104), stream(300), stream(None)] == ["h", "<300>", ""]
    assert max(byte_codec(50).encode("zebra", True)) < 50

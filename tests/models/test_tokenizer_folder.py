"""The files beside the weights: tokenizer.json, settings, templates; which are wrong or damaged."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from base.errors import InputError
from models.chat import apply_chat_template
from tests.models.pre_tokenizers import LLAMA_3, byte_level, patterns
from tests.models.tokenizer_folders import (
    assert_equal,
    read,
    spm_model,
    write,
    write_tiktoken,
)
from tests.models.vocabularies import SPECIAL, TEXTS, train_bytes, train_spm

# What tokenizer_config.json may say, as files of real models do.
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "names": {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "unk_token": None,
    },
    "first token": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "last token": {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True},
    "no first token": {"bos_token": "<s>", "add_bos_token": False},
    "no name for the first": {"bos_token": None, "add_bos_token": True},
    "a plain token made special": {"pad_token": "<think>"},
    "a word made special": {"pad_token": "the"},
    "further special tokens": {
        "additional_special_tokens": [
            "<tool>",
            {"__type": "AddedToken", "content": "</tool>", "special": True},
        ]
    },
    "added by id": {
        "added_tokens_decoder": {
            "530": {"content": "<extra>", "special": True, "normalized": False},
            "529": {"content": "<plain>", "special": False, "lstrip": True, "normalized": False},
            "528": {"content": "of <is>", "special": False, "normalized": True},
        }
    },
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("processed", [True, False])
def test_tokenizer_json_is_read_as_transformers_reads_it(
    name: str, processed: bool, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bytes(patterns(LLAMA_3), None)
    size = tokenizer.get_vocab_size()
    if processed:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    # What a training run leaves behind must neither cut nor fill up a prompt.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50, pad_id=1, pad_token='"')
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = dict(SETTINGS[name])
    if "added_tokens_decoder" in settings:
        entries = settings["added_tokens_decoder"].values()
        settings["added_tokens_decoder"] = {
            str(size + i): entry for i, entry in enumerate(reversed(list(entries)))
        }
    write(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **settings)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    codec = read(tmp_path)
    texts = [*TEXTS, "<tool>x</tool> of <is> <plain>  <extra> the <think>"]
    assert_equal(codec, reference, texts)
    names = {"pad_token": '"', **codec.special}  # which transformers takes from the padding
    assert names == reference.special_tokens_map


def test_tokens_of_added_tokens_json_are_added(tmp_path: Path) -> None:
    tokenizer = train_bytes(byte_level(True), None)
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "added_tokens.json", **{"<b>": size + 1, "<a>": size})
    write(tmp_path, "special_tokens_map.json", eos_token="<b>")
    codec = read(tmp_path)
    assert codec.encode("<a><b>", False) == [size, size + 1]
    assert codec.decode([size, size + 1]) == "<a>"
    assert codec.stop_tokens == {size + 1}
    write(tmp_path, "added_tokens.json", **{"<b>": size + 7})
    with pytest.raises(InputError, match=rf"'<b>' has id {size}, but id {size + 7} in"):
        read(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(spm_model())
    return tmp_path


def test_stop_tokens_come_from_the_most_special_file_that_names_some(folder: Path) -> None:
    assert read(folder).stop_tokens == {2}
    assert read(folder, eos_token_id=5).stop_tokens == {5}
    write(folder, "generation_config.json", eos_token_id=[3, 7])
    assert read(folder, eos_token_id=5).stop_tokens == {3, 7}
    write(folder, "generation_config.json", eos_token_id=9)
    assert read(folder, eos_token_id=5).stop_tokens == {9}
    # A negative id stands for no token, as in transformers: nothing ends an answer then.
    for given, stops in ((-1, set()), ([3, -1], {3}), ([None, 4], {4}), ([-1, None], set())):
        write(folder, "generation_config.json", eos_token_id=given)
        assert read(folder, eos_token_id=5).stop_tokens == stops
    for empty in (None, [], [None]):
        write(folder, "generation_config.json", eos_token_id=empty)
        assert read(folder, eos_token_id=5).stop_tokens == {5}
        assert read(folder, eos_token_id=empty).stop_tokens == {2}
    for wrong in ("</s>", [1, "x"], True, {"a": 1}, math.inf, [1, math.nan]):
        write(folder, "generation_config.json", eos_token_id=wrong)
        with pytest.raises(InputError, match="must be a token's id or a list"):
            read(folder)


def test_templates_come_from_files_or_settings_by_name(folder: Path) -> None:
    assert read(folder).chat_templates == {}
    write(folder, chat_template="a")
    assert read(folder).chat_templates == {"default": "a"}
    write(
        folder, chat_template=[{"name": n, "template": t} for n, t in (("default", "b"), ("rag", "c"))]
    )
    assert read(folder).chat_templates == {"default": "b", "rag": "c"}
    write(folder, chat_template={"default": "b", "rag": "c"})
    assert read(folder).chat_templates == {"default": "b", "rag": "c"}
    (folder / "chat_template.jinja").write_text("d é")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("e")
    assert read(folder).chat_templates == {"default": "d é", "tool_use": "e"}
    (folder / "chat_template.jinja").write_text("\ufefff")
    assert read(folder).chat_templates["default"] == "f"


WRONG_TEMPLATES: dict[str, Any] = {
    "a list of numbers": [1],
    "a number": 1,
    "an object of numbers": {"default": 1, "rag": "x"},
    "without its name": [{"template": "x"}],
    "an empty list": [[]],
}


@pytest.mark.parametrize("kind", [*WRONG_TEMPLATES, "no text", "too large", "a folder"])
def test_a_wrong_template_matters_only_where_it_is_asked_for(kind: str, folder: Path) -> None:
    file = folder / "chat_template.jinja"
    if kind == "a folder":
        file.mkdir()
    elif kind not in WRONG_TEMPLATES:
        file.write_bytes(b"\xff" if kind == "no text" else b"x" * (2 << 20))
    write(folder, chat_template=WRONG_TEMPLATES.get(kind))
    codec = read(folder)
    assert codec.decode(codec.encode("the", True)) == "the"
    with pytest.raises(InputError, match="chat_template"):
        apply_chat_template(codec, [{"role": "user", "content": "x"}])


WRONG: dict[str, dict[str, Any]] = {
    "a token is a number": {"bos_token": 3},
    "a token is nothing": {"eos_token": {"x": "y"}},
    "a flag is a text": {"add_bos_token": "yes"},
    "added tokens are a list": {"added_tokens_decoder": [1]},
    "an added token is a number": {"added_tokens_decoder": {"1": 2}},
    "an added token is empty": {"added_tokens_decoder": {"9999": {"content": ""}}},
    "an id is a word": {"added_tokens_decoder": {"x": {"content": "y"}}},
    "an id is beyond all": {"added_tokens_decoder": {"99999999999": {"content": "y"}}},
    "an id leaves a gap": {"added_tokens_decoder": {"9999": {"content": "y"}}},
    "further tokens are a number": {"additional_special_tokens": 5},
    "further tokens are numbers": {"additional_special_tokens": [5]},
}


@pytest.mark.parametrize("settings", WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_one_message(settings: dict[str, Any], folder: Path) -> None:
    write(folder, **settings)
    with pytest.raises(InputError, match=str(folder)):
        read(folder)


def test_no_tokenizer_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model nor"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece", "unigram", "tiktoken"])
def test_a_damaged_file_is_one_message_or_a_tokenizer(kind: str, tmp_path: Path) -> None:
    """Bytes changed, cut out and doubled at random: InputError, or else it can be used."""
    file = tmp_path / ("tokenizer.json" if kind == "tokenizer.json" else "tokenizer.model")
    if kind == "tokenizer.json":
        train_bytes(byte_level(True), None).save(str(file))
    elif kind == "sentencepiece":
        file.write_bytes(spm_model())
    elif kind == "unigram":
        train_spm(file, model_type="unigram", vocab_size=400, normalization_rule_name="nmt_nfkc")
    else:
        write_tiktoken(tmp_path)
    good = file.read_bytes()
    draw = random.Random(2)
    messages = []
    for _ in range(120):
        at, length = draw.randrange(len(good)), draw.choice([1, 1, 8, 200])
        filling = draw.choice([b"", draw.randbytes(length), good[at : at + length] * 2])
        file.write_bytes(good[:at] + filling + good[at + length :])
        try:
            codec = read(tmp_path)
            codec.decode(codec.encode(TEXTS[0] + SPECIAL[0], True))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 5 and all(str(tmp_path) in message for message in messages)
    for content in (
        b"",
        b"{",
        good[:-1] + b"\xff\xff",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"aGk= 0\n",
        b"\x12\x00",
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=str(file)):
            read(tmp_path)

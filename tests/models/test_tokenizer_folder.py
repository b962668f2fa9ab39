"""Tokenizers beside the weights against transformers, sentencepiece and tiktoken."""

from __future__ import annotations

import base64
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

from base.errors import InputError
from models.chat import apply_chat_template
from models.tokenizer.byte_level import spell
from models.tokenizer.codec import TextCodec
from models.tokenizer.open import load_codec
from tests.models.test_tokenizer_gguf import LLAMA_3, byte_level, patterns
from tests.models.vocabularies import CORPUS, SPECIAL, TEXTS, train_bytes, train_spm
from weights.checkpoint import Checkpoint


def read(folder: Path, **config: Any) -> TextCodec:
    return load_codec(Checkpoint(folder, "safetensors", {}, config))


def write(folder: Path, name: str = "tokenizer_config.json", **content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def assert_equal(codec: TextCodec, reference: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        for whole in (True, False):
            tokens = codec.encode(text, whole)
            assert tokens == reference.encode(text, add_special_tokens=whole), text
            assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True), text


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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    train_spm(folder / "tokenizer.model")
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    return tmp_path


def test_a_sentencepiece_model_gives_the_tokens_of_transformers(folder: Path) -> None:
    from transformers import LlamaTokenizer

    added = {
        "700": {"content": "<|tool|>", "special": True, "normalized": False},
        "2": {"content": "</s>", "special": True, "normalized": False},
    }
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    added[str(size)] = added.pop("700")
    write(folder, add_bos_token=True, add_eos_token=True, added_tokens_decoder=added)
    reference = LlamaTokenizer.from_pretrained(folder)
    # transformers drops the first space of a text, which the model was trained with.
    texts = [text for text in TEXTS if not text.startswith((" ", "\u2581"))]
    assert_equal(read(folder), reference, [*texts, "a<|tool|> b"])


def test_a_sentencepiece_model_gives_the_tokens_of_sentencepiece(folder: Path) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    codec = read(folder)
    assert codec.encode("a", True) == [
        1,
        *original.encode("a"),
    ]  # Llama's first token, unless the file says otherwise
    words = [word for text in CORPUS for word in text.split(" ")]
    draw = random.Random(1)
    texts = [text for text in TEXTS if "<s>" not in text]
    texts += [draw.choice(["", " "]).join(draw.choices(words, k=6)) for _ in range(100)]
    texts += ["".join(draw.choices("aehinrst  <\u4e16\n", k=30)) for _ in range(300)]
    for text in texts:
        tokens = original.encode(text)
        assert codec.encode(text, False) == tokens, text
        assert codec.decode(tokens) == original.decode(tokens), text


def test_a_sentencepiece_model_without_a_space_in_front(tmp_path: Path) -> None:
    """As Gemma's: no space in front, user-defined runs of spaces."""
    import sentencepiece

    file = train_spm(
        tmp_path / "tokenizer.model",
        add_dummy_prefix=False,
        user_defined_symbols=["\u2581\u2581", "\n\n"],
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    codec = read(tmp_path)
    for text in [text for text in TEXTS if "<s>" not in text and "\u2581" not in text]:
        tokens = original.encode(text)
        assert codec.encode(text, False) == tokens, text
        assert codec.decode(tokens) == original.decode(tokens) == text


def test_legacy_puts_a_space_behind_special_tokens(folder: Path) -> None:
    """Llama 2's tokenizer.json does so, by Prepend and Replace."""
    write(folder, legacy=True)
    codec = read(folder)
    model = json.loads(_pipeline(folder))["model"]
    model["merges"] = [tuple(pair) for pair in model["merges"]]
    declared = Tokenizer(
        models.BPE(
            model["vocab"], model["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    declared.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    declared.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    declared.add_tokens([AddedToken("<think>", normalized=False)])
    for text in TEXTS:
        assert codec.encode(text, False) == declared.encode(text).ids, text
    write(folder, legacy=False)
    assert read(folder).encode("<s>hi", False) != codec.encode("<s>hi", False)


def _pipeline(folder: Path) -> str:
    from models.tokenizer.spm import build_spm, read_spm

    return str(build_spm(read_spm(folder / "tokenizer.model")).to_str())


def test_a_unigram_model_gives_the_tokens_of_sentencepiece_and_transformers(tmp_path: Path) -> None:
    """As T5's: compiled normalization, spaces collapsed, no bytes to fall back to."""
    import sentencepiece
    from transformers import T5Tokenizer

    file = train_spm(
        tmp_path / "tokenizer.model",
        model_type="unigram", vocab_size=300, byte_fallback=False, character_coverage=1.0,
        normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, user_defined_symbols=[],
        control_symbols=[], pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    write(tmp_path, add_eos_token=True)
    codec = read(tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in [text for text in TEXTS if "</s>" not in text]:
        assert codec.encode(text, False) == original.encode(text), text
    # transformers splits at whitespace that the normalization leaves, sentencepiece does not.
    assert_equal(codec, T5Tokenizer.from_pretrained(tmp_path, extra_ids=0), TEXTS[:7] + TEXTS[8:])


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A vocabulary as tiktoken has it: bytes first, then what BPE has learned, in its order."""
    trained = train_bytes(patterns(LLAMA_3), None)
    letters = {spell(bytes([byte])): byte for byte in range(256)}
    merges = json.loads(trained.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        token = bytes(letters[letter] for letter in left + right)
        if token not in tokens:
            tokens.append(token)
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiktoken(folder: Path, ranks: dict[bytes, int]) -> None:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def test_metas_tiktoken_file_gives_the_tokens_of_tiktoken(
    ranks: dict[bytes, int], tmp_path: Path
) -> None:
    import tiktoken

    write_tiktoken(tmp_path, ranks)
    base = len(ranks)
    codec = read(tmp_path, vocab_size=base + 256)
    special = {
        "<|begin_of_text|>": base, "<|end_of_text|>": base + 1, "<|start_header_id|>": base + 6,
        "<|end_header_id|>": base + 7, "<|eom_id|>": base + 8, "<|eot_id|>": base + 9,
        "<|python_tag|>": base + 10, "<|reserved_special_token_2|>": base + 5,
        "<|reserved_special_token_247|>": base + 255,
    }  # fmt: skip
    original = tiktoken.Encoding("x", pat_str=LLAMA_3, mergeable_ranks=ranks, special_tokens=special)
    for text in [*TEXTS, *CORPUS, "".join(special), " <|eot_id|> a <|start_header_id|>user"]:
        tokens = original.encode(text, allowed_special="all")
        assert codec.encode(text, False) == tokens, text
        assert codec.encode(text, True) == [base, *tokens]
        plain = [token for token in tokens if token < base]
        assert codec.decode(tokens) == original.decode(plain), text
    assert codec.stop_tokens == {base + 1, base + 8, base + 9}
    assert codec.special == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    with pytest.raises(
        InputError, match=rf"{base + 256}, but the model has 202048: it is not of Llama 3"
    ):
        read(tmp_path, vocab_size=202048)


def test_a_tiktoken_file_with_hugging_faces_settings(ranks: dict[bytes, int], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tiktoken(tmp_path, ranks)
    names = ["<s>", "</s>", "<unk>"]
    added = {str(len(ranks) + i): {"content": name, "special": True} for i, name in enumerate(names)}
    write(tmp_path, added_tokens_decoder=added, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    codec = read(tmp_path, vocab_size=5)
    assert_equal(codec, reference)
    assert codec.stop_tokens == {len(ranks) + 1}


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


VOCAB_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt-2": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    "defaults": {"tokenizer_class": "GPT2TokenizerFast"},
    "ends": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": True},
    "prefix": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "unk_token": "<unk>"},
    "neox": {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "</s>", "pad_token": None},
    "codegen": {"tokenizer_class": "CodeGenTokenizer"},
    "qwen": {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|im_end|>"},
    "qwen prefix": {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True},
    "added": {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": ["<|im_start|>", "<tool>"],
    },
}


@pytest.mark.parametrize("name", VOCAB_SETTINGS)
def test_vocab_and_merges_are_read_as_transformers_class_reads_them(name: str, tmp_path: Path) -> None:
    import transformers

    settings = VOCAB_SETTINGS[name]
    write_vocab(tmp_path)
    write(tmp_path, **settings)
    if name == "added":
        size = len(json.loads((tmp_path / "vocab.json").read_text()))
        write(tmp_path, "added_tokens.json", **{"<tool>": size, "<plain>": size + 1})
    reference = getattr(transformers, settings["tokenizer_class"]).from_pretrained(tmp_path)
    codec = read(tmp_path)
    assert_equal(codec, reference, [*TEXTS, *CORPUS[:5], "<tool>x</tool> <plain> y<|endoftext|> z"])
    assert codec.special == reference.special_tokens_map
    for file in ("vocab.json", "tokenizer_config.json", "merges.txt"):
        content = (tmp_path / file).read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + content)
    marked = read(tmp_path)
    assert all(marked.encode(text, True) == codec.encode(text, True) for text in TEXTS)


def write_vocab(folder: Path) -> None:
    """A vocabulary with special tokens inside, as GPT-2's files have it."""
    model = json.loads(train_bytes(byte_level(True), None).to_str())["model"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *model["vocab"]])}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def test_vocab_and_merges_that_cannot_be_used(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    with pytest.raises(InputError, match=r"names no class: without a tokenizer\.json only GPT2"):
        read(tmp_path, model_type="llama")
    assert read(tmp_path, model_type="qwen3").special["eos_token"] == "<|endoftext|>"
    write(tmp_path, tokenizer_class="BertTokenizer")
    with pytest.raises(InputError, match="names the class 'BertTokenizer'"):
        read(tmp_path, model_type="qwen3")
    write(tmp_path, tokenizer_class="GPT2Tokenizer")
    good = (tmp_path / "merges.txt").read_bytes()
    for wrong, match in (
        (b"ab\n", "line 2 is not two"),
        (b"a b c\n", "line 2"),
        (b"\xff a\n", "utf-8"),
    ):
        (tmp_path / "merges.txt").write_bytes(b"#version\n" + wrong + good)
        with pytest.raises(InputError, match=f"merges.txt cannot be read as merges .*{match}"):
            read(tmp_path)
    (tmp_path / "merges.txt").write_text("zzz yyy\n")
    with pytest.raises(InputError, match=r"vocab\.json cannot be read as a tokenizer"):
        read(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"merges\.txt does not exist"):
        read(tmp_path)
    for vocab, match in (({"a": "b"}, "tokens to their ids"), ({"a": 0, "b": 0}, "have the same id")):
        write(tmp_path, "vocab.json", **vocab)
        with pytest.raises(InputError, match=match):
            read(tmp_path)


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
def test_a_damaged_file_is_one_message_or_a_tokenizer(
    kind: str, ranks: dict[bytes, int], llama: Path, tmp_path: Path
) -> None:
    """Bytes changed, cut out and doubled at random: InputError, or else it can be used."""
    file = tmp_path / ("tokenizer.json" if kind == "tokenizer.json" else "tokenizer.model")
    if kind == "tokenizer.json":
        train_bytes(byte_level(True), None).save(str(file))
    elif kind == "sentencepiece":
        file.write_bytes((llama / "tokenizer.model").read_bytes())
    elif kind == "unigram":
        train_spm(file, model_type="unigram", vocab_size=400, normalization_rule_name="nmt_nfkc")
    else:
        write_tiktoken(tmp_path, ranks)
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

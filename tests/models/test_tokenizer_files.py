"""Vocabularies without a tokenizer.json against transformers, sentencepiece and tiktoken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers

from base.errors import InputError
from tests.models.pre_tokenizers import LLAMA_3, byte_level
from tests.models.tokenizer_folders import (
    assert_equal,
    read,
    spm_model,
    tiktoken_ranks,
    write,
    write_tiktoken,
)
from tests.models.vocabularies import CORPUS, SPECIAL, TEXTS, train_bytes, train_spm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(spm_model())
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
    # Llama's first token, unless the file says otherwise.
    assert codec.encode("a", True) == [1, *original.encode("a")]
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


def test_metas_tiktoken_file_gives_the_tokens_of_tiktoken(tmp_path: Path) -> None:
    import tiktoken

    write_tiktoken(tmp_path)
    ranks = tiktoken_ranks()
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


def test_a_tiktoken_file_with_hugging_faces_settings(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tiktoken(tmp_path)
    ranks = tiktoken_ranks()
    names = ["<s>", "</s>", "<unk>"]
    added = {str(len(ranks) + i): {"content": name, "special": True} for i, name in enumerate(names)}
    write(tmp_path, added_tokens_decoder=added, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    codec = read(tmp_path, vocab_size=5)
    assert_equal(codec, reference)
    assert codec.stop_tokens == {len(ranks) + 1}


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

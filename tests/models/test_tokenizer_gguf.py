"""Tokenizers embedded in GGUF files against transformers' reading of what the models themselves ship.

The references are pipelines as those models' tokenizer.json declares them, spelled out here; where
transformers reads the GGUF file as the model means it, that is compared, too.
"""

# ruff: noqa: E501
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from base.errors import InputError
from models.chat import apply_chat_template
from models.tokenizer.byte_level import SPLITTINGS, build_bytes
from models.tokenizer.codec import TextCodec
from models.tokenizer.open import load_codec
from models.tokenizer.spm import read_spm
from tests.models.pre_tokenizers import (
    DIGITS,
    FALCON,
    GPT_2,
    LLAMA_3,
    O200K,
    QWEN_2,
    QWEN_35,
    TEKKEN,
    byte_level,
    patterns,
)
from tests.models.vocabularies import SPECIAL, TEXTS, gguf_of, train_bytes, train_spm, write_gguf
from weights.checkpoint import Checkpoint
from weights.open import open_checkpoint

# Name in GGUF: (pre-tokenizer and normalizer of the model's tokenizer.json, whether transformers reads
# the GGUF file to the same effect).
MODELS: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    "default": (patterns(r"[\p{P}$+<=>^~|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"), None, False),
    "gpt-2": (byte_level(True), None, True),
    "phi-2": (byte_level(True), None, True),
    "llama-bpe": (patterns(LLAMA_3), None, True),
    "llama3": (patterns(LLAMA_3), None, True),
    "llama-v3": (patterns(LLAMA_3), None, True),
    "dbrx": (patterns(LLAMA_3), None, True),
    "smaug-bpe": (patterns(LLAMA_3), None, True),
    "qwen2": (patterns(QWEN_2), "NFC", False),
    "deepseek-r1-qwen": (patterns(QWEN_2), "NFC", False),
    "qwen35": (patterns(QWEN_35), "NFC", False),
    "tekken": (patterns(TEKKEN), None, True),
    "gpt-4o": (patterns(O200K), None, True),
    "falcon": (FALCON, None, False),
    "smollm": (DIGITS, None, False),
    "starcoder": (DIGITS, None, False),
    "refact": (DIGITS, None, False),
    "command-r": (DIGITS, "NFC", False),
}


# Letters of all cases and scripts, marks, digits, punctuation, symbols, blanks: each class a pattern names.
SIGNS = "aZ' 's'LL\t\n\r  \u00a0é\u0301Éß世ǅª19٣²Ⅷ$+<=>^~|`./_-\"#&*@!?。«€\u200d👍"


def test_every_pre_tokenizer_is_compared() -> None:
    assert MODELS.keys() == SPLITTINGS.keys()


@pytest.mark.parametrize("pre", MODELS)
def test_a_byte_level_vocabulary_gives_the_tokens_of_its_tokenizer_json(
    pre: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    declared, normalizer, same_in_gguf = MODELS[pre]
    trained = train_bytes(declared, normalizer)
    trained.save(str(tmp_path / "tokenizer.json"))
    file = gguf_of(tmp_path / "model.gguf", trained, pre=pre, add_bos_token=False, eos_token_id=300)
    codec = load_codec(open_checkpoint(file))
    references: list[Any] = [PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))]
    if same_in_gguf:
        references.append(AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name))
    for text in TEXTS:
        tokens = codec.encode(text, True)
        # transformers' reading of GGUF does not find special tokens that are not ASCII.
        for reference in references[: 1 if SPECIAL[-1] in text else 2]:
            assert tokens == reference.encode(text, add_special_tokens=False), text
            assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True), text


@pytest.mark.parametrize("pre", MODELS)
def test_a_text_is_cut_where_the_tokenizer_json_cuts_it(pre: str) -> None:
    """Whatever the merges make of it: also where no word of the texts would show the difference."""
    declared, normalizer, _ = MODELS[pre]
    trained = train_bytes(declared, normalizer)
    built = build_bytes(trained.get_vocab(False), [], SPLITTINGS[pre])
    draw = random.Random(3)
    texts = [*TEXTS, *("".join(draw.choices(SIGNS, k=12)) for _ in range(400))]
    for text in texts:
        words = [
            tokenizer.pre_tokenizer.pre_tokenize_str(
                tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
            )
            for tokenizer in (built, trained)
        ]
        assert words[0] == words[1], text


@pytest.mark.parametrize("pre", MODELS)
def test_a_word_that_is_a_token_is_taken_whole_where_the_model_does_so(
    pre: str, tmp_path: Path
) -> None:
    """`ignore_merges` of the tokenizer.json of Llama 3 and Mistral Nemo."""
    tokens = [*"helo", "hello", "he"]
    file = write_gguf(tmp_path / "m.gguf", "gpt2", tokens, merges=["h e"], pre=pre, add_bos_token=False)
    whole = pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    assert load_codec(open_checkpoint(file)).encode("hello", True) == ([4] if whole else [5, 2, 2, 3])


def test_pre_tokenizers_are_distinguished() -> None:
    """Families share names, but no family is another by mistake: the texts distinguish them."""
    from tests.models.vocabularies import CORPUS

    def words(pre: str) -> str:
        tokenizer = train_bytes(MODELS[pre][0], MODELS[pre][1])
        pieces = []
        for text in (*TEXTS, *CORPUS):
            normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
            pieces.append(tokenizer.pre_tokenizer.pre_tokenize_str(normal))
        return str([[piece for piece, _ in words] for words in pieces])

    distinct = [
        "default",
        "gpt-2",
        "llama-bpe",
        "qwen2",
        "qwen35",
        "tekken",
        "gpt-4o",
        "falcon",
        "refact",
    ]
    assert len({words(pre) for pre in distinct}) == len(distinct)


def test_first_and_last_tokens_come_as_the_file_says(tmp_path: Path) -> None:
    trained = train_bytes(byte_level(True), None)
    size = trained.get_vocab_size()
    ids = {"bos_token_id": size - 1, "eos_token_id": size - 2, "eot_token_id": 5, "eom_token_id": 6}

    def around(**keys: Any) -> tuple[list[int], list[int]]:
        codec = load_codec(open_checkpoint(gguf_of(tmp_path / "m.gguf", trained, **ids, **keys)))
        assert codec.stop_tokens == {size - 2, 5, 6}
        whole, bare = codec.encode("a", True), codec.encode("a", False)
        at = whole.index(bare[0])
        return whole[:at], whole[at + len(bare) :]

    assert around(pre="gpt-2") == ([], [])
    assert around(pre="llama-bpe") == ([size - 1], [])
    assert around(pre="llama-bpe", add_bos_token=False) == ([], [])
    assert around(pre="gpt-2", add_bos_token=True, add_eos_token=True) == ([size - 1], [size - 2])


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_spm(tmp_path_factory.mktemp("spm") / "tokenizer.model")


def spm_keys(spm: Path) -> tuple[list[str], dict[str, Any]]:
    vocabulary = read_spm(spm)
    # llama.cpp's converter writes the spaces of user-defined pieces as such.
    tokens = [
        piece.replace("\u2581", " ") if kind == 4 else piece
        for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True)
    ]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return tokens, {"scores": list(vocabulary.scores), "token_type": list(vocabulary.types), **ids}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_in_gguf_gives_the_tokens_of_transformers(
    prefix: bool, spm: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer

    tokens, keys = spm_keys(spm)
    if not prefix:
        keys["add_space_prefix"] = False
    file = write_gguf(tmp_path / "model.gguf", "llama", tokens, **keys)
    codec = load_codec(open_checkpoint(file))
    reference: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    if not prefix:  # which transformers does not read from GGUF
        (tmp_path / "tokenizer.model").write_bytes(spm.read_bytes())
        reference = LlamaTokenizer.from_pretrained(tmp_path, add_prefix_space=False, add_bos_token=True)
    for text in TEXTS:
        if prefix and text.startswith((" ", "\u2581")):
            continue  # see test_tokenizer_folder: transformers drops this space
        ids = codec.encode(text, True)
        assert ids == reference.encode(text), text
        assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    assert codec.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert codec.stop_tokens == {2}


def test_a_folder_and_a_gguf_file_of_one_vocabulary_agree(spm: Path, tmp_path: Path) -> None:
    tokens, keys = spm_keys(spm)
    from_gguf = load_codec(open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", tokens, **keys)))
    from_folder = load_codec(Checkpoint(spm.parent, "safetensors", {}, {}))
    for text in TEXTS:
        for whole in (True, False):
            assert from_gguf.encode(text, whole) == from_folder.encode(text, whole)


def test_sentencepiece_merges_by_score_and_not_by_id(spm: Path, tmp_path: Path) -> None:
    tokens, keys = spm_keys(spm)
    order = list(range(len(tokens)))
    first = keys["token_type"].index(1)
    order[first:] = reversed(order[first:])
    shuffled = {name: [keys[name][i] for i in order] for name in ("scores", "token_type")}
    as_it_is = load_codec(open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", tokens, **keys)))
    names = [tokens[i] for i in order]
    reversed_ = load_codec(
        open_checkpoint(write_gguf(tmp_path / "b.gguf", "llama", names, **{**keys, **shuffled}))
    )
    for text in TEXTS:
        assert [order[i] for i in reversed_.encode(text, True)] == as_it_is.encode(text, True), text


def test_a_byte_token_is_not_spelled_out(tmp_path: Path) -> None:
    """sentencepiece merges no pieces into a byte token, though its name can be put together."""
    tokens = ["<unk>", "<s>", "</s>", "<0x00>", "<0x41>", *"<0x41>", "<0", "x4", "<0x4", "1>"]
    tokens = list(dict.fromkeys(tokens))
    types = [2, 3, 3, 6, 6, *[1] * (len(tokens) - 5)]
    scores = [0.0] * 5 + [-float(i) for i in range(len(tokens) - 5)]
    keys = {"scores": scores, "token_type": types, "add_space_prefix": False, "add_bos_token": False}
    codec = load_codec(open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", tokens, **keys)))
    assert [tokens[i] for i in codec.encode("<0x41>", True)] == ["<0x4", "1>"]
    assert codec.decode([4]) == "A" and codec.decode(codec.encode("<0x41>", True)) == "<0x41>"


def test_several_chat_templates_are_read_by_name(tmp_path: Path) -> None:
    trained = train_bytes(byte_level(True), None)
    file = gguf_of(tmp_path / "m.gguf", trained, pre="gpt-2")
    config = dict(open_checkpoint(file).config)
    config["tokenizer.chat_template"] = "a"
    config["tokenizer.chat_templates"] = ["tool_use", "absent"]
    config["tokenizer.chat_template.tool_use"] = "b"
    codec = load_codec(Checkpoint(file, "gguf", {}, config))
    assert codec.chat_templates == {"default": "a", "tool_use": "b"}


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    trained = train_bytes(byte_level(True), None)
    with pytest.raises(InputError, match="'viking', which is not known; known are command-r, dbrx"):
        load_codec(open_checkpoint(gguf_of(tmp_path / "m.gguf", trained, pre="viking")))
    with pytest.raises(InputError, match=r"kind 'rwkv'.*'gpt2'.*'llama'"):
        load_codec(open_checkpoint(write_gguf(tmp_path / "r.gguf", "rwkv", ["a"])))


DAMAGE: dict[str, Any] = {
    "no tokens": {"tokens": None},
    "tokens are numbers": {"tokens": [1, 2, 3]},
    "a token twice": {"tokens": ["a", "a", "b"]},
    "types too few": {"token_type": [1]},
    "types are texts": {"token_type": ["x"] * 3},
    "bos is a text": {"bos_token_id": "a"},
    "a flag is a number": {"add_bos_token": 2},
    "scores too few": {"model": "llama", "scores": [0.0]},
    "no scores": {"model": "llama"},
    "a score is no number": {"model": "llama", "scores": [0.0, float("nan"), 1.0]},
    "a merge of one": {"merges": ["a"]},
    "a merge of others": {"merges": ["x y"]},
    "a merge into nothing": {"merges": ["a b"]},
    "merges are numbers": {"merges": [1]},
    "the pre-tokenizer is a list": {"pre": ["gpt-2"]},
}


@pytest.mark.parametrize("none", [4, -1, (1 << 32) - 1])
def test_an_id_beyond_the_vocabulary_is_none(none: int, tmp_path: Path) -> None:
    """Converters write -1 as 4294967295."""
    names = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator")
    config: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": none for name in names}
    config |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    config |= {"tokenizer.ggml.tokens": ["a", "b", "c", "bc"], "tokenizer.ggml.merges": ["b c"]}
    config |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}

    def read(**more: int) -> TextCodec:
        given = {f"tokenizer.ggml.{name}_token_id": value for name, value in more.items()}
        return load_codec(Checkpoint(tmp_path / "m.gguf", "gguf", {}, config | given))

    codec = read()
    assert codec.stop_tokens == frozenset() and codec.special == {}
    assert codec.encode("bca", True) == [3, 0]
    codec = read(eot=2, bos=0)
    assert codec.stop_tokens == {2} and codec.special == {"bos_token": "a"}
    assert codec.encode("bca", True) == [0, 3, 0]


@pytest.mark.parametrize("keys", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tokenizer_is_one_message(keys: dict[str, Any], tmp_path: Path) -> None:
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "c", "bc"], "merges": ["b c"]}
    given = {**good, **keys}
    config = {f"tokenizer.ggml.{name}": value for name, value in given.items() if value is not None}
    with pytest.raises(InputError, match=r"m\.gguf"):
        load_codec(Checkpoint(tmp_path / "m.gguf", "gguf", {}, config))
    # A template that cannot be used matters to nobody who does not ask for it.
    config = {f"tokenizer.ggml.{name}": value for name, value in good.items()}
    config |= {"tokenizer.chat_template": 3}
    codec = load_codec(Checkpoint(tmp_path / "m.gguf", "gguf", {}, config))
    assert codec.encode("bca", True) == [3, 0]
    with pytest.raises(InputError, match=r"m\.gguf: chat_template must be"):
        apply_chat_template(codec, [{"role": "user", "content": "x"}])

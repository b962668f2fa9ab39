"""A tokenizer with tokens that the embedding does not have: refused before the model runs."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from base.errors import InputError
from engine.chat import channel_of, next_task
from engine.resolve import resolve
from models.tokenizer.codec import byte_codec, within_vocabulary
from models.tokenizer.open import load_codec
from tests.jobs import job_of
from tests.quantize.small import make_folder
from tests.running import RunYoke
from weights.open import open_checkpoint

MESSAGE = "a token of the text has id 128, and the model has a vocabulary of 128 (ids 0 to 127)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 rows of embedding, and a token more; of the stop tokens two are beyond."""
    folder = make_folder(tmp_path_factory.mktemp("wide") / "model")
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken("<|r6|>", special=True)])
    tokenizer.save(str(file))
    settings = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 128, 4294967295]}))
    return folder


def words(folder: Path) -> tuple[str, ...]:
    return (f"model={folder}", "compile=false", "dtype=float32", "max_new_tokens=2", "max_seq_len=64")


def test_a_prompt_with_it_is_named(folder: Path, tmp_path: Path, run_yoke: RunYoke) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("fine\nthe cat <|r6|> and\n")
    done = run_yoke("--ranks=2", *words(folder), f"prompts={file}")
    assert done.returncode == 2, done.stderr
    assert f"error: {file} line 2: {MESSAGE}" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "stop tokens beyond the vocabulary of 128 are left out: 128, 4294967295\n" in done.stderr
    assert done.stdout == ""


def test_a_chat_goes_on(folder: Path) -> None:
    """The user gets an error message, and the next turn works."""
    resolved = resolve(job_of(words(folder), need_prompt=False))
    codec = within_vocabulary(load_codec(open_checkpoint(folder)), 128)
    assert codec.stop_tokens == {1}
    ours, theirs = socket.socketpair()
    with theirs:
        channel = channel_of(ours.detach())
        conversations = [[{"role": "user", "content": text}] for text in ("the cat <|r6|>", "a dog")]
        channel.messages.extend({"id": i, "messages": each} for i, each in enumerate(conversations))
        assert next_task(resolved, codec, channel, (), 64, 512) is None
        assert MESSAGE in json.loads(theirs.recv(1 << 16))["error"]
        task = next_task(resolved, codec, channel, (), 64, 512)
        assert task is not None and task["tokens"] == [ord(c) for c in "a dog"]
        channel.socket.close()


def test_the_codec_of_a_smaller_vocabulary() -> None:
    lines: list[str] = []
    codec = within_vocabulary(byte_codec(256), 100, lines.append)
    assert codec.encode("abc", True) == [97, 98, 99]
    with pytest.raises(InputError, match="id 122, and the model has a vocabulary of 100"):
        codec.encode("az", False)
    assert codec.encode("", True) == [] and not lines

"""Defaults that nobody set give way: to what the model can have, and to what its files say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import InputError
from engine.job import fitted_length
from engine.memory import job_needs, with_batch
from engine.opening import about_length
from engine.resolve import from_json, resolve, to_json
from models.config import Rope
from models.presets import PRESETS
from models.sampling import Sampling
from tests.jobs import job_of
from tests.quantize.small import make_folder
from tests.running import RunYoke

RUN = ("compile=false", "dtype=float32", "output=json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def write(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def sampling_of(folder: Path, *words: str) -> tuple[Sampling, str]:
    """Of the one prompt, and what is said."""
    resolved = resolve(job_of([f"model={folder}", "prompt=x", *words]))
    assert from_json(to_json(resolved)) == resolved
    return resolved.prompts[0].sampling, "\n".join(resolved.notes)


NEUTRAL = Sampling()
WARM = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("settings", "words", "wanted", "said"),
    [
        ({}, [], NEUTRAL, ""),
        ({"eos_token_id": 2, "max_length": 10, "use_cache": True}, [], NEUTRAL, ""),
        (WARM, [], Sampling(0.6, 50, 0.9), "temperature=0.6, top_k=50, top_p=0.9"),
        ({"do_sample": True, "top_k": 0}, [], Sampling(1.0), "temperature=1.0;"),
        (WARM, ["generation_config=none"], NEUTRAL, ""),
        (WARM, ["temperature=0", "top_k=9"], Sampling(0.0, 9, 0.9), ""),
        (WARM, ["top_p=1"], Sampling(0.6, 50, 1.0), "temperature=0.6, top_k=50;"),
        ({**WARM, "do_sample": False}, [], Sampling(top_p=0.9), ""),
        ({**WARM, "do_sample": False}, ["temperature=2"], Sampling(2.0, 0, 0.9), "from.*: top_p=0.9;"),
        ({"min_p": 0.1, "top_p": None, "top_k": "few"}, [], Sampling(min_p=0.1), ""),
        ({"repetition_penalty": 1.5}, [], Sampling(repetition_penalty=1.5), "repetition_penalty=1.5;"),
        ({"repetition_penalty": 1.5}, ["repetition_penalty=1"], NEUTRAL, ""),
        (
            {"suppress_tokens": [9, -1], "bad_words_ids": [[7], [2], [3, 4]], "eos_token_id": 2},
            ["logit_bias=5:1"],
            Sampling(logit_bias=((7, float("-inf")), (9, float("-inf")), (5, 1.0))),
            "logit_bias=7:-inf,9:-inf.*\n.*not supported.*: bad_words_ids of several tokens",
        ),
        ({"no_repeat_ngram_size": 3, "typical_p": 1.0}, [], NEUTRAL, "not supp.*ngram_size=3$"),
        ({"num_beams": 4}, ["num_beams=2"], NEUTRAL, ""),
    ],
)  # fmt: skip
def test_generation_config_gives_defaults(
    settings: dict[str, Any], words: list[str], wanted: Sampling, said: str, folder: Path
) -> None:
    write(folder, **settings)
    sampling, lines = sampling_of(folder, *words)
    assert sampling == wanted
    assert re.search(said, lines, re.DOTALL) if said else lines == ""


@pytest.mark.parametrize(
    ("settings", "words", "match"),
    [
        ({"repetition_penalty": 0}, [], "repetition_penalty=0.0 must be a number at least"),
        ({"repetition_penalty": "high"}, [], "repetition_penalty=high must be a number"),
        ({"do_sample": True, "top_k": 1.5}, [], "top_k=1.5 must be a whole number"),
        ({"suppress_tokens": 5}, [], "suppress_tokens=5 must be a list of token ids"),
        ({"bad_words_ids": [5]}, [], "bad_words_ids=.5. a list of such lists"),
        ({"stop_strings": [3]}, [], "stop=.3.: must be a string"),
        (
            {"repetition_penalty": 1.5},
            ["num_beams=2"],
            "num_beams=2 does not go with repetition_penalty",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_named_with_the_way_out(
    settings: dict[str, Any], words: list[str], match: str, folder: Path
) -> None:
    write(folder, **settings)
    with pytest.raises(InputError, match=f"{match}.*generation_config=none leaves"):
        sampling_of(folder, *words)
    assert sampling_of(folder, *words, "generation_config=none") == (NEUTRAL, "")


def test_prompts_of_a_file_have_them_and_may_say_otherwise(folder: Path, tmp_path: Path) -> None:
    write(folder, repetition_penalty=1.5, suppress_tokens=[4], stop_strings="end")
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b", "repetition_penalty": 1, "logit_bias": {"5": 1}}]
    file.write_text("\n".join(map(json.dumps, lines)))
    resolved = resolve(job_of([f"model={folder}", f"prompts={file}"]))
    ban = (4, float("-inf"))
    assert [prompt.sampling for prompt in resolved.prompts] == [
        Sampling(repetition_penalty=1.5, logit_bias=(ban,)),
        Sampling(logit_bias=(ban, (5, 1.0))),
    ]
    assert resolved.job.stop == '["end"]'
    chat = resolve(job_of([f"model={folder}"], need_prompt=False))
    assert chat.job.repetition_penalty == 1.5


def test_a_gguf_file_has_its_own(folder: Path) -> None:
    write(folder, repetition_penalty=1.5)
    (folder / "x.gguf").write_bytes(b"GGUF")
    job = job_of([f"model={folder / 'x.gguf'}", "prompt=x"])
    assert resolve(job).job == job


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_transformers_with_its_defaults(ranks: int, folder: Path, run_yoke: RunYoke) -> None:
    """In fp32, and with less room than a default asks for: 24 tokens, of which the answer gets 16."""
    from transformers import AutoModelForCausalLM

    more = {"model_type": "llama", "max_position_embeddings": 24}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    write(folder, repetition_penalty=1.4, suppress_tokens=[ord("d"), ord("e")], do_sample=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([[ord(c) for c in "the dogs"]])
    wanted = model.generate(prompt, max_new_tokens=16, pad_token_id=0)[0, 8:].tolist()
    done = run_yoke(f"--ranks={ranks}", *RUN, f"model={folder}", "prompt=the dogs")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == wanted
    plain = model.generate(
        prompt, max_new_tokens=16, pad_token_id=0, repetition_penalty=1.0, suppress_tokens=None
    )
    assert plain[0, 8:].tolist() != wanted
    lines = done.stderr.splitlines()
    assert "taken from generation_config.json: repetition_penalty=1.4, logit_bias=100" in lines[0]
    assert lines[1].startswith("max_seq_len=24: the most that this model has, less than the default")
    assert "leaves 1 of 1 answers less room than the default max_new_tokens=64" in done.stderr


def test_lengths_that_nobody_gave_are_lowered(folder: Path) -> None:
    words = [f"model={folder}", "prompt=x", "dtype=float32"]
    job = job_of(words)
    assert fitted_length(job, 512) == 512
    assert fitted_length(job, 4096) == fitted_length(job, None) == 1024
    assert fitted_length(job, 4096, 256) == 256
    given = job_of([*words, "max_seq_len=600"])
    assert fitted_length(given, 600, 256) == 600
    with pytest.raises(InputError, match="max_seq_len=600: this model was trained for 512 at most"):
        fitted_length(given, 512)
    # The estimate goes by the same, and refuses before a rank is started.
    with pytest.raises(InputError, match="max_seq_len=600: this model was trained for 512"):
        job_needs(with_batch(resolve(given)), 1, False)
    sizes = [
        job_needs(with_batch(resolve(job_of([*words, *more]))), 1, False)[0]["kv_cache"]
        for more in ([], ["max_seq_len=512"], ["max_seq_len=256"])
    ]
    assert sizes[0] == sizes[1] == 2 * sizes[2]
    short = job_of([*words, "max_seq_len=40"])
    assert (short.max_new_tokens, short.given) == (39, ("model", "prompt", "dtype", "max_seq_len"))
    with pytest.raises(InputError, match="max_new_tokens=64 does not leave room"):
        job_of([*words, "max_seq_len=40", "max_new_tokens=64"])


def test_room_that_changes_short_texts_is_reported() -> None:
    """Rotary embeddings that depend on it (`models.rope`)."""
    plain = PRESETS["tiny"]
    long = Rope(kind="longrope", original_max_seq_len=300)
    assert plain.stretched_from is None
    assert replace(plain, rope=Rope(kind="yarn", original_max_seq_len=300)).stretched_from is None
    assert replace(plain, rope=long).stretched_from == 300
    dynamic = Rope(kind="dynamic", original_max_seq_len=200)
    assert replace(plain, rope=long, local_rope=dynamic).stretched_from == 200
    assert not list(about_length(1024, 1024, 4096, None))
    (line,) = about_length(1024, 300, 4096, 300)
    assert line.startswith("max_seq_len=300: the most that this model has without changing short")
    (line,) = about_length(2000, 2000, 4096, 300)
    assert line.startswith("max_seq_len=2000 is more than the 300 tokens that")
    assert "short texts differ from transformers'" in line

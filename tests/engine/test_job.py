"""What is wrong with a job is said before any rank starts, with exit code 2 and the way out."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.job import Job, check_ranks, from_json, parse_job, resolve, to_json
from weights.errors import InputError

GOOD = ["model=tiny", "weights=random", "prompt=hi"]


def test_values_are_typed_and_texts_are_kept_as_they_are() -> None:
    job = parse_job([*GOOD, "temperature=1", "top_k=5", "compile=false", "prompt=[1, ${x}] = yes"])
    assert job.temperature == 1.0
    assert job.top_k == 5
    assert job.compile is False
    assert job.prompt == "[1, ${x}] = yes"
    assert job.max_new_tokens == Job.max_new_tokens


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["modle=tiny"], "unknown key 'modle', did you mean 'model'"),
        (["max_new_token=5"], "did you mean 'max_new_tokens'"),
        (["qqq=5"], "unknown key 'qqq'; see"),
        (["max_new_tokens=ten"], "max_new_tokens=ten: must be of type int"),
        (["compile=perhaps"], "compile=perhaps: must be of type bool"),
        (["temperature=nan"], "temperature=nan: must be between"),
        (["top_p=0"], "top_p=0.0: must be between"),
        (["max_new_tokens=0"], "must be between 1"),
        (["max_new_tokens=2000"], "raise max_seq_len"),
        (["output=jsno"], "must be one of text, json, did you mean 'json'"),
        (["dtype=int8"], "must be one of auto, float32"),
        (["prompt="], "prompt= is missing"),
        (["num_layers=0"], "num_layers=0: it must be at least 1"),
        (["model=tinny"], "did you mean 'tiny'"),
        (["weights=auto", "num_layers=2"], "add weights=random"),
        (["weights=auto", "model=llama-70b"], "weights=random"),
        (["weights=auto", "model=no/such-model"], "hf download OWNER/NAME"),
        (["weights=auto", "model=" + "x" * 5000 + "/y"], "no weights found"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        resolve(parse_job([*GOOD, *words]))


@pytest.mark.parametrize("key", ["model", "prompt"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"{key}= is missing"):
        parse_job([word for word in GOOD if not word.startswith(key)])


def test_overrides_change_a_preset() -> None:
    resolved = resolve(parse_job([*GOOD, "num_layers=5", "ffn_dim=64"]))
    assert resolved.config is not None
    assert (resolved.config.num_layers, resolved.config.ffn_dim) == (5, 64)
    with pytest.raises(InputError, match="7 ranks for 6 query heads"):
        check_ranks(resolved, 7)


def test_a_job_survives_the_way_to_its_ranks() -> None:
    resolved = resolve(parse_job([*GOOD, 'prompt="é\n\U0001f600']))
    assert from_json(to_json(resolved)) == resolved


def test_a_model_in_the_hub_cache_is_found(tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert resolve(parse_job(["model=some/model", "prompt=x"])).checkpoint == snapshot


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=llama-70b", "prompt=x"], "weights=random"),
        (["model=tiny", "weights=random"], "prompt= is missing"),
        (["--ranks=7", *GOOD], "7 ranks for 6 query heads"),
        (["--ranks=0", *GOOD], "--ranks 0: there can be 1 to 64 ranks"),
        (["--ranks=two", *GOOD], "argument --ranks"),
        (["--comm=mpi", *GOOD], "--comm mpi: must be auto, shm, gloo, nccl, ccl or deepspeed"),
        (["--bind-core", *GOOD], "unrecognized arguments: --bind-core"),
        (["generat", *GOOD], "'generat' is not a command"),
        (["--json", *GOOD], "--json goes with the commands plan, doctor and models only"),
        (["plan", "--sysfs", "/nonexistent"], "lists no cpus"),
    ],
)
def test_the_command_refuses_with_one_message_and_code_2(
    words: list[str], said: str, run_yoke: Callable
) -> None:
    done = run_yoke(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_mistake_that_every_rank_meets_is_said_once(tmp_path: Path, run_yoke: Callable) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 50)
    done = run_yoke("--ranks=3", f"model={broken}", "prompt=x")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "cannot be read as GGUF" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_is_too_long_is_refused(run_yoke: Callable) -> None:
    done = run_yoke("--ranks=2", *GOOD, f"prompt={'x' * 1000}")
    assert done.returncode == 2, done.stderr
    assert "the prompt has 1000 tokens" in done.stderr
    assert "max_seq_len=1064" in done.stderr


def test_help_and_plan(run_yoke: Callable) -> None:
    for words in ([], ["--help"], ["-h"]):
        done = run_yoke(*words)
        assert done.returncode == 0
        assert "examples:" in done.stdout
        assert "max_new_tokens=" in done.stdout
    for flag in ("--bind-cores-to-rank", "--bind_cores_to_rank"):
        plan = json.loads(run_yoke("plan", flag, "--ranks=2", "--json").stdout)
        assert [rank["memory_policy"] for rank in plan["ranks"]] == ["bind", "bind"]
        assert plan["backend"] == "shm"
    start = time.monotonic()
    assert "Ranks (shm)" in run_yoke("plan").stdout
    assert time.monotonic() - start < 5  # torch alone takes longer than that to import when cold


def test_text_is_streamed_and_the_figures_follow(run_yoke: Callable) -> None:
    done: subprocess.CompletedProcess[str] = run_yoke(
        "--ranks=2", *GOOD, "compile=false", "max_new_tokens=5", "dtype=float32"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    line = done.stderr.strip().splitlines()[-1]
    for figure in ("2 + 5 tokens", "TTFT", "TPOT", "tokens/s", "compile", "rank 1 on cpus"):
        assert figure in line


def test_random_weights_and_seeds_give_the_same_text_for_any_number_of_ranks(
    run_yoke: Callable,
) -> None:
    words = [*GOOD, "compile=false", "dtype=float32", "temperature=0.8", "top_p=0.9", "output=json"]
    runs = [
        json.loads(run_yoke(f"--ranks={ranks}", *words, f"seed={seed}").stdout)["token_ids"]
        for ranks, seed in ((1, 7), (2, 7), (4, 7), (1, 8))
    ]
    assert runs[0] == runs[1] == runs[2] != runs[3]

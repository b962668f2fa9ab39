"""What is wrong with a job is said before any rank starts, with exit code 2 and the way out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from base.errors import InputError
from engine.job import Job, stop_texts
from engine.memory import job_needs, smaller_batch, with_batch
from engine.resolve import check_ranks, from_json, resolve, to_json
from models.find import find_weights
from tests.jobs import job_of
from tests.running import RunYoke

GOOD = ["model=tiny", "weights=random", "prompt=hi"]


def test_values_are_typed_and_texts_are_kept_as_they_are() -> None:
    job = job_of([*GOOD, "temperature=1", "top_k=5", "compile=false", "prompt=[1, ${x}] = yes"])
    assert job.temperature == 1.0
    assert job.top_k == 5
    assert job.compile == "false"
    assert job.prompt == "[1, ${x}] = yes"
    assert job.max_new_tokens == Job.max_new_tokens


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["modle=tiny"], "unknown key 'modle', did you mean 'model'"),
        (["max_new_token=5"], "did you mean 'max_new_tokens'"),
        (["qqq=5"], "unknown key 'qqq'; see"),
        (["max_new_tokens=ten"], "max_new_tokens=ten: must be of type int"),
        (["compile=perhaps"], "compile=perhaps: must be one of auto, true, false"),
        (["temperature=nan"], "temperature=nan"),
        (["top_p=0"], "top_p=0.0 must be a number above 0"),
        (["max_new_tokens=0"], "must be between 1"),
        (["max_new_tokens=2000"], "raise max_seq_len"),
        (["output=jsno"], "must be one of text, json, did you mean 'json'"),
        (["dtype=int8"], "must be one of auto, float32"),
        (["prompt="], "prompt= is missing"),
        (["num_layers=0"], "num_layers=0: it must be at least 1"),
        (["model=tinny"], "did you mean 'tiny'"),
        (["weights=auto", "num_layers=2"], "add weights=random"),
        (["prompts=x.txt"], "prompt= and prompts= are both given"),
        (["logit_bias=5"], "logit_bias=5: must be a list of TOKEN_ID:BIAS"),
        (['stop=["a", ""]'], "or a JSON list of non-empty strings"),
        (["logprobs=99"], "logprobs=99"),
        (["logprobs=0"], "logprobs=0 is shown only with output=json"),
        (["num_beams=4", "temperature=1"], "num_beams=4 does not go with temperature=1.0"),
        (["draft=lookup", "engine=hf"], "does not go with engine=hf"),
        (["kv_dtype=bfloat16", "dtype=float32"], "does not go with dtype=float32"),
        (["kv_dtype=int4"], "must be one of auto, float32, bfloat16, float16, int8"),
        (["weights=auto", "model=llama-70b"], "weights=random"),
        (["weights=auto", "model=llama-70b"], "fetch=true            downloads meta-llama/Llama-2-70b"),
        (["weights=auto", "model=no/such-model"], "no such path, and it is not in the hub cache"),
        (["weights=auto", "model=" + "x" * 5000 + "/y"], "no such path"),
        (
            ["weights=auto", "model=docs/chatt.md"],
            "no such file or folder, did you mean '.*docs/chat.md'",
        ),
        (["weights=auto", "model=./no/m.gguf"], "no such file or folder, nor the folder no"),
        (["weights=auto", "model=zzzz"], "neither a preset nor a path. python launch.py models lists"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        resolve(job_of([*GOOD, *words]))


@pytest.mark.parametrize("key", ["model", "prompt"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"{key}= is missing"):
        job_of([word for word in GOOD if not word.startswith(key)])


def test_overrides_change_a_preset() -> None:
    resolved = resolve(job_of([*GOOD, "num_layers=5", "ffn_dim=64"]))
    assert resolved.config is not None
    assert (resolved.config.num_layers, resolved.config.ffn_dim) == (5, 64)
    with pytest.raises(InputError, match="7 ranks for 6 query heads"):
        check_ranks(resolved, 7)


def test_a_job_survives_the_way_to_its_ranks() -> None:
    resolved = resolve(job_of([*GOOD, 'prompt="é\n\U0001f600']))
    assert from_json(to_json(resolved)) == resolved
    words = [*GOOD, "draft=tiny", "logit_bias=5:-1.5,6:2", "temperature=0.5", 'stop=["a", "b"]']
    resolved = resolve(job_of(words))
    assert resolved.draft is not None
    assert resolved.prompts[0].sampling.logit_bias == ((5, -1.5), (6, 2.0))
    assert stop_texts(resolved.job) == ("a", "b")
    assert from_json(to_json(resolved)) == resolved


def test_how_many_texts_are_made_at_once(tmp_path: Path) -> None:
    """As many as there are prompts, up to eight; as many as are asked for; never more than fit."""
    file = tmp_path / "prompts.txt"
    file.write_text("a\n" * 20)
    words = ["model=tiny", "weights=random", f"prompts={file}"]
    asked = resolve(job_of(words))
    assert with_batch(asked).job.batch == 8
    tried, sizes = with_batch(asked), []
    while smaller := smaller_batch(asked, tried):
        tried = smaller
        sizes.append(tried.job.batch)
    assert sizes == [4, 2, 1]
    fixed = resolve(job_of([*words, "batch=3"]))
    assert with_batch(fixed).job.batch == 3
    assert smaller_batch(fixed, with_batch(fixed)) is None
    assert with_batch(resolve(job_of([*GOOD, "num_beams=5"]))).job.batch == 5
    one, three = (
        job_needs(with_batch(resolve(job_of([*words, f"batch={size}"]))), 2, True)[0] for size in (1, 3)
    )
    assert three["kv_cache"] == 3 * one["kv_cache"]
    assert three["weights"] == one["weights"]


def test_a_model_in_the_hub_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert resolve(job_of(["model=some/model", "prompt=x"])).checkpoint == snapshot


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"HF_HUB_CACHE": "a", "HUGGINGFACE_HUB_CACHE": "b", "HF_HOME": "c"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "b", "HF_HOME": "c", "XDG_CACHE_HOME": "d"}, "b"),
        ({"HF_HOME": "c", "XDG_CACHE_HOME": "d"}, "c/hub"),
        ({"XDG_CACHE_HOME": "d"}, "d/huggingface/hub"),
        ({}, ".cache/huggingface/hub"),
    ],
)
def test_variables_of_the_hub_cache(
    given: dict[str, str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the hub library."""
    snapshot = add_revision(tmp_path / where, "abc", "main")
    add_revision(tmp_path / "elsewhere", "abc", "main")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, f"$HOME/{value}" if name.endswith("CACHE") else str(tmp_path / value))
    if "XDG_CACHE_HOME" in given:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / given["XDG_CACHE_HOME"]))
    assert find_weights("some/model") == snapshot


def add_revision(cache: Path, commit: str, *refs: str) -> Path:
    folder = cache / "models--some--model"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text("{}")
    for ref in refs:
        file = folder / "refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    return snapshot


def test_a_revision_that_is_not_main_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    first = add_revision(tmp_path, "abc", "v1.0", "refs/pr/1")
    with pytest.raises(InputError, match=r"refs/main is missing") as error:
        find_weights("some/model")
    assert f"model={first}  refs/pr/1 v1.0\n" in str(error.value)
    assert "no weights found" not in str(error.value)
    second = add_revision(tmp_path, "def")
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123")
    with pytest.raises(InputError, match=r"names '0123', which is not there") as error:
        find_weights("some/model", "draft")
    assert f"draft={first}" in str(error.value) and f"draft={second}\n" in str(error.value)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("def")
    assert find_weights("some/model") == second


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=llama-70b", "prompt=x"], "weights=random"),
        (["model=tiny", "weights=random"], "prompt= is missing, and standard input has no prompt"),
        (["--ranks=7", *GOOD], "7 ranks for 6 query heads"),
        (["--ranks=0", *GOOD], "--ranks 0: must be 1 to 64 here"),
        (["--ranks=two", *GOOD], "argument --ranks"),
        (["--comm=mpi", *GOOD], "--comm mpi: must be auto, shm, gloo, nccl, ccl or deepspeed"),
        (["--bind-core", *GOOD], "there is no flag --bind-core, did you mean --bind-core"),
        (["generat", *GOOD], "'generat' is not a command"),
        (["--share", "--nnodes=2", *GOOD], "--share is for runs that Yoke starts itself"),
        (["device=cuda", *GOOD], "device=cuda: 0 GPUs are visible here; leave device=cuda out"),
        (["--rank-per=gpu", *GOOD], "--rank-per gpu: 0 GPUs are visible here"),
        (["--json", *GOOD], "--json is for the commands plan, doctor, models and cache only"),
        (["plan", "--sysfs", "/nonexistent"], "lists no cpus"),
    ],
)
def test_the_command_refuses_with_one_message_and_code_2(
    words: list[str], said: str, run_yoke: RunYoke
) -> None:
    done = run_yoke(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_mistake_that_every_rank_meets_is_said_once(tmp_path: Path, run_yoke: RunYoke) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 50)
    done = run_yoke("--ranks=3", f"model={broken}", "prompt=x")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "cannot be read as GGUF" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_is_too_long_is_refused(run_yoke: RunYoke) -> None:
    long = ["--ranks=2", *GOOD, "compile=false", f"prompt={'x' * 1000}"]
    done = run_yoke(*long, "max_new_tokens=64")
    assert done.returncode == 2, done.stderr
    assert "the prompt has 1000 tokens" in done.stderr
    assert "max_seq_len=1064" in done.stderr
    # A length that nobody gave is what the prompt leaves room for, and a line says so.
    done = run_yoke(*long, "output=json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 24 and "less room" in done.stderr


def test_help_and_plan(run_yoke: RunYoke) -> None:
    for words in ([], ["--help"], ["-h"]):
        done = run_yoke(*words)
        assert done.returncode == 0
        assert "examples:" in done.stdout
        assert "max_new_tokens=" in done.stdout
    for flag in ("--bind-cores-to-rank", "--bind_cores_to_rank"):
        plan = json.loads(run_yoke("plan", flag, "--ranks=2", "--json").stdout)
        assert [rank["memory_policy"] for rank in plan["ranks"]] == ["bind", "bind"]
        assert plan["backend"] == "shm"
    assert "Ranks (shm)" in run_yoke("plan").stdout


def test_text_is_streamed_and_the_figures_follow(run_yoke: RunYoke) -> None:
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
    run_yoke: RunYoke,
) -> None:
    words = [*GOOD, "compile=false", "dtype=float32", "temperature=0.8", "top_p=0.9", "output=json"]
    runs = [
        json.loads(run_yoke(f"--ranks={ranks}", *words, f"seed={seed}").stdout)["token_ids"]
        for ranks, seed in ((1, 7), (2, 7), (4, 7), (1, 8))
    ]
    assert runs[0] == runs[1] == runs[2] != runs[3]

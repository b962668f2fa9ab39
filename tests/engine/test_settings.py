"""Settings of a chat: checked by the job's parser; what cannot change is refused with its reason."""

from __future__ import annotations

import pytest

from base.errors import InputError
from engine.job import KEYS
from engine.settings import CHANGEABLE, changed_job, settings_of
from tests.jobs import job_of

JOB = job_of(["model=tiny", "weights=random", "prompt=x", "top_k=5", "max_seq_len=100"])


def test_values_are_changed_and_the_rest_stays() -> None:
    job = changed_job(JOB, ["temperature=0.7", "seed=3", "stop=a b", "seed=4"], 64, 512)
    assert (job.temperature, job.seed, job.stop, job.top_k) == (0.7, 4, "a b", 5)
    assert settings_of(job) == settings_of(JOB) | {"temperature": 0.7, "seed": 4, "stop": "a b"}
    assert set(job.given) == {*JOB.given, "temperature", "seed", "stop"}
    again = changed_job(job, ["temperature=0"], 64, 512)
    assert (again.temperature, again.seed) == (0.0, 4)
    assert changed_job(job, [], 64, 512) == job


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["temperature=hot"], "temperature=hot: must be of type float"),
        (["temperature=-1"], "temperature=-1.0 must be a number at least 0"),
        (["temperatur=1"], "unknown key 'temperatur', did you mean 'temperature'"),
        (["seed"], "'seed' is not key=value; such as: temperature=0.7"),
        (["max_new_tokens=64"], "does not leave room for a prompt in max_seq_len=64"),
        (["logit_bias=512:1"], "a token of logit_bias=512 must be an integer from 0 to 511"),
        (["stop=[1]"], "stop=.1.: must be a string, or a JSON list"),
        (["seed=1", "model=llama-7b"], "model= cannot change during a chat: the model was loaded"),
        (["max_seq_len=10"], "the cache was made for its value"),
        (["generation_config=none"], "read once, at the start"),
        (["prompts=x"], "prompts= goes with generate, not with chat"),
    ],
)
def test_what_is_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        changed_job(JOB, words, 64, 512)


def test_every_other_key_has_a_reason() -> None:
    for key in set(KEYS) - set(CHANGEABLE):
        with pytest.raises(InputError, match=f"^{key}= .*[Ww]hat can: temperature, top_k"):
            changed_job(JOB, [f"{key}=1"], 64, 512)

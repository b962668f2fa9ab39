"""The main promise: one model, whatever the number of ranks, the transport and the compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import RunYoke

PROMPT = "The capital of France is"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def reference(gguf: Path, reference_model: Any) -> list[int]:
    """What the transformers library makes of the same file, in fp32."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = reference_model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens = made[0, prompt["input_ids"].shape[1] :].tolist()
    return [token for token in tokens if token != tokenizer.eos_token_id]


CASES = [(1, "auto", "false"), (1, "auto", "true")] + [
    (ranks, comm, compiled)
    for ranks in (2, 3)
    for comm in ("shm", "gloo")
    for compiled in ("false", "true")
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "comm", "compiled"), CASES)
def test_greedy_text_is_that_of_transformers(
    ranks: int, comm: str, compiled: str, reference: list[int], run_yoke: RunYoke
) -> None:
    done = run_yoke(
        "--bind-cores-to-rank",
        f"--ranks={ranks}",
        f"--comm={comm}",
        "model=smollm2-135m",
        f"prompt={PROMPT}",
        f"max_new_tokens={NEW_TOKENS}",
        "dtype=float32",
        f"compile={compiled}",
        "output=json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["token_ids"] == reference
    assert len(report["token_ids"]) == report["tokens"] > 10
    assert len(report["peak_rss_bytes"]) == len(report["plan"]) == ranks
    assert report["ttft_s"] > 0
    assert report["tpot_s"] > 0
    assert (report["compile_s"] > 0) == (compiled == "true")

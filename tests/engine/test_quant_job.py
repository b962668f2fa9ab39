"""quant= on the command line: checked before ranks start, counted in the estimate, named at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from base.errors import InputError
from engine.job import help_lines
from engine.memory import job_needs, keeps_quantized, with_batch
from engine.resolve import check_ranks, from_json, resolve, to_json
from models.quant_rules import Asked, Quant, parse_quant
from tests.jobs import job_of
from tests.running import RunYoke
from tests.weights.quant_files import Kind, write
from weights.schemes import Scheme

WORDS = ["model=llama-3.2-1b", "weights=random", "prompt=hi", "dtype=bfloat16"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["quant=int5"], "quant=int5: must be one of auto, none, int8, .*, did you mean 'int"),
        (["quant=int8", "dtype=float32"], "does not go with dtype=float32: .* add dtype=bfloat16"),
        (["quant=int4-g32", "weights=auto", "engine=hf"], "quant=int4-g32 does not go with engine=hf"),
        (["quant=int4-g128", "model=tiny"], "rows of 96, .* use one of int8, int4-g32"),
        (
            ["quant=int4-g128", "quant_head=same", "model=tiny"],
            "^quant=int4-g128 quant_head=same: .* rows of 96, .* use one of int8, int4-g32",
        ),
        (["quant=int8", "quant_head=int4"], "quant_head=int4: must be one of int8, same, none"),
        (
            ["quant_head=int8"],
            "quant_head=int8 .* quant=auto names none; leave quant_head= out, or add",
        ),
        (
            ["quant=none", "quant_head=none"],
            "quant_head=none needs .* quant=none names none; leave .* out",
        ),
        (["quant=auto", "quant_head=same", "engine=hf"], "quant_head=same needs .* one of int8, int4"),
    ],
)
def test_what_does_not_go_is_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_ranks(resolve(job_of([*WORDS, *words])), 1)


def test_ranks_that_would_cut_too_little_are_refused() -> None:
    resolved = resolve(job_of([*WORDS, "model=tiny", "quant=int8"]))
    check_ranks(resolved, 3)
    with pytest.raises(InputError, match=r"with 2 ranks .* --ranks N with N of 1, 3, or quant=none"):
        check_ranks(resolved, 2)


def test_a_draft_keeps_what_its_file_has() -> None:
    for quant, wanted in (("int8", "auto"), ("auto", "auto"), ("none", "none")):
        head = ["quant_head=same"] if quant == "int8" else []
        resolved = resolve(job_of([*WORDS, "draft=llama-3.2-1b", f"quant={quant}", *head]))
        assert resolved.draft is not None
        assert resolved.draft.job.quant == wanted
        assert resolved.draft.quant == parse_quant(wanted)


def test_what_is_asked_is_one_value_that_ranks_get_too() -> None:
    for words, wanted in (
        ([], Quant()),
        (["quant=none"], None),
        (["activations=int8"], Quant(round_prompts=True)),  # a file's own int8, as W8A8 has
        (["quant=int8", "activations=int8"], Quant(Asked(Scheme(8, 0)), round_prompts=True)),
        (["quant=int4-g32", "quant_head=same"], Quant(Asked(Scheme(4, 32), Scheme(4, 32)))),
        (["quant=int4-g64-asym", "quant_head=none"], Quant(Asked(Scheme(4, 64, False), None))),
    ):
        resolved = resolve(job_of([*WORDS, *words]))
        assert resolved.quant == wanted
        assert from_json(to_json(resolved)) == resolved


def test_the_estimate_counts_packed_weights(tmp_path: Path) -> None:
    def weights(*words: str) -> int:
        return job_needs(with_batch(resolve(job_of([*WORDS, *words]))), 1, False)[0]["weights"]

    plain, eight, four = weights(), weights("quant=int8"), weights("quant=int4-g32")
    embedding = 128256 * 2048
    same, tied = (weights("quant=int4-g32", f"quant_head={head}") for head in ("same", "none"))
    linears = plain // 2 - embedding  # but for some norms
    assert eight == pytest.approx(linears + 3 * embedding, rel=0.01)
    assert four == pytest.approx(linears * 9 / 16 + 3 * embedding, rel=0.01)
    assert same == pytest.approx(linears * 9 / 16 + 2.5625 * embedding, rel=0.01)
    assert tied == pytest.approx(linears * 9 / 16 + 2 * embedding, rel=0.01)
    write(tmp_path, Kind("gptq", 4, 64, True))
    kept, undone = (weights("weights=auto", f"model={tmp_path}", f"quant={q}", "max_seq_len=64",
                            "max_new_tokens=2") for q in ("auto", "none"))  # fmt: skip
    assert kept < 0.7 * undone


def test_auto_keeps_what_our_matmuls_take() -> None:
    for words, kept in (([], True), (["dtype=float32"], False), (["quant=none"], False)):
        assert keeps_quantized(job_of([*WORDS, *words])) is kept
    assert not keeps_quantized(job_of(WORDS), "cuda:0")
    assert any("quant=" in line and "int4-g32" in line for line in help_lines())


def test_a_run_reports_its_scheme_and_bad_words_end_with_2(gguf: Path, run_yoke: RunYoke) -> None:
    words = ["prompt=hi", "max_new_tokens=2", "max_seq_len=64", "compile=false", "output=json",
             "dtype=bfloat16"]  # fmt: skip
    for head, expected in (
        ([], "layers: 8 of int4-g32, 1 of int8"),
        (["quant_head=same"], "layers: 9 of int4-g32"),
    ):
        done = run_yoke("model=tiny", "weights=random", "quant=int4-g32", *head, *words)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["quant"] == "int4-g32"
        assert expected in done.stderr
    for bad, match in (
        (["model=tiny", "weights=random", "quant=int9"], "quant=int9: must be one of"),
        (["--ranks=2", "model=tiny", "weights=random", "quant=int8"], "use --ranks N with N of 1, 3"),
        (["model=tiny", "weights=random", "quant_head=same"], "quant_head=same needs a scheme"),
        ([f"model={gguf}", "quant=int8"], "quantized already"),
    ):
        done = run_yoke(*bad, *words)
        assert done.returncode == 2, done.stderr
        assert match in done.stderr
        assert "Traceback" not in done.stderr

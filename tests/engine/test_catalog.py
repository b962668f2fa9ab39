"""`launch.py models`: what it says of each model is what the loader would need."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from base.errors import InputError
from engine.catalog import catalog, select
from engine.memory import Workload, rank_needs
from launcher.models_view import format_count, model_rows, notes, render
from models import config_hf
from models.config import ModelConfig, expected_shapes
from models.decoder import BLOCKS
from models.families import FAMILIES, family_of
from models.presets import PRESETS
from models.sizes import layout_of, num_active_parameters, num_parameters
from tests.running import RunYoke
from tp.shard import slices_of
from weights.formats import gguf_names


def counted_one_by_one(config: ModelConfig, rank: int, size: int) -> int:
    """The slow reference: every weight by its name, as the loader goes through them; of a vocabulary a
    whole block."""
    layout = layout_of(config, rank, size)
    missing = layout.vocab_block - (layout.vocab_stop - layout.vocab_start)
    return sum(
        prod(part.stop - part.start for part in slices_of(name, shape, layout))
        + (missing * prod(shape[1:]) if shape[0] == config.vocab_size else 0)
        for name, shape in expected_shapes(config).items()
    )


# Experts in all layers, in some, in none; biases, of rank 0 alone too; norms behind.
MIXED = replace(
    PRESETS["tiny"], num_layers=5, num_experts=7, experts_per_token=3, expert_dim=36,
    dense_layers=(1, 4), attention_bias=True,
)  # fmt: skip
SHAPES = {
    "mixed": MIXED,
    "all-dense": replace(MIXED, dense_layers=tuple(range(5))),
    **{name: PRESETS[name] for name in ("tiny", "gemma-3-1b", "falcon-7b", "gpt-j-6b", "mixtral-8x7b")},
    "many-experts": replace(PRESETS["qwen3-30b-a3b"], num_layers=9, dense_layers=(0,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_counting_by_kinds_is_exact(name: str) -> None:
    config = SHAPES[name]
    assert num_parameters(config) == sum(map(prod, expected_shapes(config).values()))
    for rank, size in ((0, 1), (0, 3), (2, 3), (1, 4)):
        needs = rank_needs(config, Workload("bfloat16", 256), rank, size)
        assert needs["weights"] == 2 * counted_one_by_one(config, rank, size)


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    chosen = replace(MIXED, num_experts=MIXED.experts_per_token)
    routers = 3 * MIXED.dim * (MIXED.num_experts - chosen.num_experts)  # all of each is read
    assert num_active_parameters(MIXED) == num_parameters(chosen) + routers
    assert num_active_parameters(PRESETS["tiny"]) == num_parameters(PRESETS["tiny"])
    # As published: 12.9, 39, 3.3 and 22 billion.
    for name, billions in (
        ("mixtral-8x7b", 12.9),
        ("mixtral-8x22b", 39.1),
        ("qwen3-30b-a3b", 3.3),
        ("qwen3-235b-a22b", 22.1),
    ):
        assert num_active_parameters(PRESETS[name]) / 1e9 == pytest.approx(billions, abs=0.1)


def test_families_are_what_the_readers_read() -> None:
    assert [family.hf for family in FAMILIES] == sorted(
        config_hf.ARCHITECTURES, key=[family.hf for family in FAMILIES].index
    )
    assert set(gguf_names.ARCHITECTURES) <= {family.gguf for family in FAMILIES}
    assert {family.block for family in FAMILIES} == set(BLOCKS)
    for name, config in PRESETS.items():
        assert family_of(name).block == config.block, name
    assert {family_of(name).name for name in PRESETS} == {family.name for family in FAMILIES}


def test_names_narrow_the_list() -> None:
    assert set(select([])) == set(PRESETS)
    assert select(["llama-7b"]) == ["llama-7b"]
    assert select(["Gemma-3", "tiny"]) == [
        "tiny",
        "gemma-3-1b",
        "gemma-3-4b",
        "gemma-3-12b",
        "gemma-3-27b",
    ]
    assert select(["*-70b"]) == ["llama-70b", "llama-3-70b", "llama-3.1-70b"]
    with pytest.raises(InputError, match=r"no model is called 'lama-7b'; the nearest: llama-7b"):
        select(["lama-7b"])
    for key, text, match in (
        ("seed", "1", "takes max_seq_len= and dtype=, not 'seed=1'"),
        ("dtype", "int8", "must be one of auto"),
        ("max_seq_len", "many", "must be of type int"),
    ):
        with pytest.raises(InputError, match=match):
            catalog(given={key: text})


def test_what_cannot_run_or_does_not_fit_is_marked() -> None:
    given = {"dtype": "float32", "max_seq_len": "4096"}
    report = catalog(["gemma-3-1b", "gpt-j-6b", "smollm2-135m"], given, (1, 8), machine_bytes=4 << 30)
    ranks = {model["name"]: model["ranks"] for model in report["models"]}
    small = rank_needs(PRESETS["smollm2-135m"], Workload("float32", 4096), 0, 1)
    expected = {"largest_rank": small, "total_bytes": sum(small.values()), "fits": True}
    assert ranks["smollm2-135m"]["1"] == expected
    assert ranks["gemma-3-1b"]["1"]["fits"] is False
    assert "8 ranks for 4 query heads" in ranks["gemma-3-1b"]["8"]["refused"]
    assert "trained for 2048" in ranks["gpt-j-6b"]["1"]["refused"]
    rows = {row[1]: row[-3:-1] for row in model_rows(report)[1:]}
    assert rows["gemma-3-1b"] == ("4.6 GiB!", "-") and rows["gpt-j-6b"] == ("-", "-")
    assert not rows["smollm2-135m"][0].endswith("!")
    said = "\n".join(notes(report))
    assert "4.0 GiB" in said and "-: gemma-3-1b: 8 ranks for 4" in said
    assert said.count("gpt-j-6b") == 1
    # Where the size of the memory is unknown, nothing is marked.
    assert "!" not in render(catalog(given=given))


def test_what_is_here_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, file in (
        ("meta-llama--Llama-3.2-1B-Instruct", "model.safetensors"),
        ("Qwen--Qwen3-4B", "config.json"),  # of a plan: no weights
        ("some--other-model", "model-q4.gguf"),
    ):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / file).write_bytes(b"{}")
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("abc")
    report = catalog()
    here = {model["name"]: model["here"] for model in report["models"] if model["here"]}
    assert set(here) == {"llama-3.2-1b", "smollm2-135m"}
    assert here["llama-3.2-1b"].endswith("models--meta-llama--Llama-3.2-1B-Instruct/snapshots/abc")
    assert {row[1] for row in model_rows(report) if row[-1] == "yes"} == set(here)
    assert report["cached"] == ["some/other-model"]
    assert "also in the hub cache: some/other-model" in notes(report)


def test_counts_have_three_digits() -> None:
    numbers = (7, 294_816, 134_515_008, 999_885_952, 9_996_000_000, 68_976_648_192, 405_853_388_800)
    assert [format_count(n) for n in numbers] == [
        "7",
        "295K",
        "135M",
        "1.00B",
        "10.0B",
        "69.0B",
        "406B",
    ]


def test_the_command(run_yoke: RunYoke) -> None:
    done = run_yoke("models", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {model["name"] for model in report["models"]} == set(PRESETS)
    assert set(report["models"][0]["ranks"]) == {"1", "2", "4", "8"}
    text = run_yoke("models", "qwen3", "max_seq_len=2048", "--ranks=3").stdout
    assert "qwen3-235b-a22b" in text and "3 ranks" in text and "max_seq_len=2048" in text
    assert "llama-7b" not in text and "Qwen3MoeForCausalLM" in text
    assert max(map(len, text.splitlines())) < 120
    done = run_yoke("models", "qwen9")
    assert done.returncode == 2 and "no model is called 'qwen9'; the nearest: qwen" in done.stderr

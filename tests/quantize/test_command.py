"""The command from a checkpoint to a folder: what it writes, read by other eyes; what it refuses; how
it ends when it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from base.errors import InputError
from comm.group import Group
from models.config_hf import from_hf
from models.load import config_of, load_model
from models.quant_rules import parse_asked, parse_quant
from quantize.command import main
from quantize.job import parse_quantize_job, searches, uses_gptq
from quantize.plan import plan_quantize
from tests.quantize.small import CONFIG, TEXT, make_folder
from tests.running import CHECKOUT, refused, wait_for_files
from tests.tensors import tensors_of
from weights.open import open_checkpoint
from weights.quant import parse_scheme
from weights.quantize import quantize_rtn

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "model")


def quantized(tmp_path: Path, source: Path, *words: str) -> Path:
    out = tmp_path / "out"
    assert main([f"model={source}", f"out={out}", *words]) == 0
    return out


def reference(name: str, stored: dict[str, Tensor], weights: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A weight as the format's description says, number by number, without Yoke's code."""
    scale = stored[name + "_scale"].numpy().astype(np.float64)
    if weights["num_bits"] == 8:
        assert weights["strategy"] == "channel"
        return stored[name].numpy() * scale
    n, k = stored[name + "_shape"].tolist()
    group = weights["group_size"]
    packed = stored[name + "_packed"].numpy().view(np.uint32)
    zeros = None
    if not weights["symmetric"]:
        zeros = stored[name + "_zero_point"].numpy().view(np.uint32)
        assert zeros.shape == (-(-n // 8), k // group)
    assert packed.shape == (n, k // 8) and scale.shape == (n, k // group)
    values = np.empty((n, k))
    for i in range(n):
        for j in range(k):
            q = int(packed[i, j // 8] >> np.uint32(4 * (j % 8))) & 15
            zero = 8
            if zeros is not None:
                zero = int(zeros[i // 8, j // group] >> np.uint32(4 * (i % 8))) & 15
            values[i, j] = (q - zero) * scale[i, j // group]
    return values


@pytest.mark.parametrize("quant", ["int8", "int4-g32", "int4-g32-asym"])
def test_the_folder_says_what_was_quantized(
    quant: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.plan.SHARD_BYTES", 60_000)
    monkeypatch.setattr("quantize.run._PIECE", 1000)  # a few rows at a time
    out = quantized(tmp_path, source, f"quant={quant}", "clip=none")
    scheme, before, stored = parse_scheme(quant), tensors_of(source), tensors_of(out)
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    groups = quantization["config_groups"]
    assert quantization["quant_method"] == "compressed-tensors" and quantization["ignore"] == []
    assert quantization["format"] == ("int-quantized" if scheme.bits == 8 else "mixed-precision")
    head = groups["group_1"] if scheme.bits == 4 else groups["group_0"]
    assert head["weights"]["num_bits"] == 8 and head["format"] == "int-quantized"
    # An index over several files names every tensor, and they are where it says.
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == stored.keys() and len(set(index.values())) > 2
    for name, file in index.items():
        assert name in load_file(out / file)
    for name, weight in before.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            own = parse_scheme("int8") if name == "lm_head.weight" else scheme
            weights = (head if name == "lm_head.weight" else groups["group_0"])["weights"]
            rounded = quantize_rtn(weight, own)
            wanted, found = rounded.dequantize().numpy(), reference(name, stored, weights)
            if own.symmetric:
                assert np.array_equal(found.astype(np.float32), wanted)
            else:  # in memory what zero points stand for is rounded to half precision
                step = rounded.scale.float().repeat_interleave(rounded.group_size, 1).numpy()
                assert (np.abs(found - wanted) <= 0.01 * step).all()
        else:  # norms, biases, the embedding: the same bits
            assert stored[name].dtype == weight.dtype and torch.equal(stored[name], weight)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert config_of(open_checkpoint(source)) == CONFIG


def test_gptq_end_to_end(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    words = ("quant=int4-g32", "sample_len=64", "output=json")
    out = quantized(tmp_path, source, f"calibration={text}", f"perplexity={text}", *words)
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "gptq" and report["calibration_tokens"] == len(TEXT)
    assert report["bytes_after"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0 < report["output_error"] < report["weight_error"] < 0.05
    assert len(report["weights"]) == 7 * CONFIG.num_layers + 1
    assert report["perplexity_before"] != report["perplexity_after"]
    assert report["perplexity_after"] == pytest.approx(report["perplexity_before"], rel=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]


def test_the_table_for_people(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized(tmp_path, source, "quant=int4-g32", "quant_head=same")
    said = capsys.readouterr()
    for word in ("gate up", "down", "all", "lm_head: int4-g32, 0.", "MB in 16 bits"):
        assert word in said.out, said.out
    assert said.err.startswith("wrote ")


def test_an_lm_head_that_is_the_embedding_stays(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "tied", tie_embeddings=True)
    out = quantized(tmp_path, source, "quant=int4-g64")
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["lm_head"] and quantization["format"] == "pack-quantized"
    assert not any("lm_head" in name for name in tensors_of(out))


def held(folder: Path, quant: str) -> dict[str, Tensor]:
    """All that a run holds of a model which it loads so."""
    checkpoint = open_checkpoint(folder)
    model = load_model(
        config_of(checkpoint), checkpoint, Group(0, 1), torch.bfloat16, quant=parse_quant(quant)
    )
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "quant", ["int4-g32/same", "int4-g32-asym/same", "int4-g32/int8", "int4-g32/none", "int8/none"]
)
def test_a_folder_holds_what_a_run_makes_for_itself(
    quant: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "source", tie_embeddings=tied)
    scheme, _, head = quant.partition("/")
    (tmp_path / "text").write_text(TEXT)
    words = (f"quant={scheme}", f"quant_head={head}", f"perplexity={tmp_path / 'text'}", "output=json")
    out = quantized(tmp_path, source, *words)
    wanted, found = held(source, quant), held(out, "auto")
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    # Untied for the sake of its copy alone, and the table as it was.
    config, stored, before = (
        json.loads((out / "config.json").read_text()),
        tensors_of(out),
        tensors_of(source),
    )
    assert config["tie_word_embeddings"] == (tied and head == "none")
    embedding = "model.embed_tokens.weight"
    assert torch.equal(stored[embedding], before[embedding])
    about = config["quantization_config"]
    assert about["ignore"] == (["lm_head"] if head == "none" else [])
    assert len(about["config_groups"]) == (2 if head == "int8" else 1)
    if head == "none" and not tied:
        assert torch.equal(stored["lm_head.weight"], before["lm_head.weight"])
    report = json.loads(capsys.readouterr().out)
    assert report["quant_head"] == {"same": scheme, "int8": "int8", "none": "none"}[head]
    assert report["bytes_before"] == 2 * sum(weight.numel() for weight in before.values())
    assert report["perplexity_before"] != report["perplexity_after"]


def test_the_head_of_a_gguf_file_is_untied(gguf: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    assert config_of(checkpoint).tie_embeddings
    for head, tied in (("same", False), ("none", True)):
        plan = plan_quantize(checkpoint, parse_asked(f"int4-g32/{head}"), untie=True)
        assert from_hf(json.loads(plan.texts["config.json"]), "config.json") == plan.config
        assert plan.config.tie_embeddings == tied == ("lm_head.weight" not in plan.schemes)


def test_what_cannot_be_done_is_said_in_a_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = f"model={source}", f"out={tmp_path / 'out'}"
    for word, match in (
        ("quant=int5", "int4-g128-asym"),
        ("quant=int8 clip=max", "must be one of"),
        ("quant=int8 quant_head=int4", "quant_head=int4: must be one of auto, int8, same, none"),
        ("quant=int4-g128 quant_head=same", "error: quant=int4-g128 quant_head=same: "),
        ("quant=int8 methd=rtn", "did you mean 'method'"),
        ("quant=int8 samples=many", "whole number"),
        ("quant=int8 damp=nan", "between 0 and 1"),
        ("quant=int8 method=gptq", "calibration=FILE"),
        ("quant=int8 method=rtn calibration=x", "does not use a text"),
        ("quant=int8 calibration=/nowhere", "does not exist"),
        ("quant=int8 perplexity=/dev/null", "device or a pipe"),
        ("out= quant=int8", "out= is missing"),
        ("quant=int8 word", "not key=value"),
    ):
        assert match in refused(main, capsys, model, out, *word.split())
    # 96 columns: the message says what fits this model.
    said = refused(main, capsys, model, out, "quant=int4-g128")
    assert Q_PROJ in said and "96 columns" in said and said.endswith(": int8, int4-g32, int4-g32-asym")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert "not empty" in refused(main, capsys, model, out, "quant=int8")


def test_sources_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder(tmp_path / "model")
    words = (f"model={source}", f"out={tmp_path / 'out'}", "quant=int8")
    config = json.loads((source / "config.json").read_text())
    changed = config | {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    }
    (source / "config.json").write_text(json.dumps(changed))
    assert "quantized already" in refused(main, capsys, *words)
    (source / "config.json").write_text(json.dumps(config))
    for name, bad in ((Q_PROJ, torch.nan), ("model.norm.weight", torch.inf)):
        tensors = tensors_of(source)
        tensors[name].view(-1)[-1] = bad
        save_file(tensors, source / "model.safetensors")
        said = refused(main, capsys, *words)
        assert name in said and "not finite" in said
        tensors[name].view(-1)[-1] = 1
        save_file(tensors, source / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_space_is_reported_before(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("weights.output.shutil.disk_usage", lambda folder: usage)
    said = refused(main, capsys, f"model={source}", f"out={tmp_path / 'out'}", "quant=int8")
    assert "1000 B free" in said and list(tmp_path.iterdir()) == []


def test_what_is_chosen_where_nothing_is_said() -> None:
    job = parse_quantize_job(["model=m", "quant=int4-g32", "out=o"])
    assert not uses_gptq(job)
    assert uses_gptq(parse_quantize_job(["model=m", "quant=int4-g32", "out=o", "calibration=t"]))
    for clip, calibration, quant, wanted in (
        ("auto", "", "int4-g32", False),
        ("auto", "text", "int4-g32", True),
        ("auto", "text", "int8", False),
        ("mse", "", "int8", True),
        ("none", "text", "int4-g32", False),
    ):
        words = [f"clip={clip}", f"calibration={calibration}", f"quant={quant}", "model=m", "out=o"]
        assert searches(parse_quantize_job(words)) == wanted
    with pytest.raises(InputError, match="quant= is missing"):
        parse_quantize_job(["model=m", "out=o"])
    # The schemes are known before anything is opened, and are one value from there on.
    same = parse_quantize_job(["model=m", "quant=int4-g32", "out=o", "quant_head=same"])
    assert (job.asked, same.asked) == (parse_asked("int4-g32"), parse_asked("int4-g32/same"))
    with pytest.raises(InputError, match="quant=int9 is not"):
        parse_quantize_job(["model=m", "out=o", "quant=int9"])
    with pytest.raises(InputError, match="unknown key 'asked'"):
        parse_quantize_job(["model=m", "out=o", "quant=int8", "asked=x"])


def test_the_help_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 104
    for key in parse_quantize_job(["model=m", "quant=int8", "out=o"]).__dict__.keys() - {"asked"}:
        assert any(line.startswith(f"  {key}=") for line in lines), key


@pytest.mark.slow
def test_a_signal_leaves_nothing(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT * 200)
    process = subprocess.Popen(
        [sys.executable, "-m", "quantize", f"model={source}", "quant=int4-g32",
         f"out={tmp_path / 'out'}", f"calibration={text}", "samples=100000", "sample_len=64"],
        cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_files(tmp_path, ".out.partial-*/*.safetensors", process)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "quantize: stopped by SIGTERM; nothing was left\n" and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["text"]

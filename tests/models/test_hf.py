"""Families that Yoke has no code for, run by their plans, against transformers.

The tolerance is that of sums of some hundred float32 products in another order: 1e-4 relative to
logits of the order of one.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from base.errors import InputError
from comm.group import Group
from engine.memory import job_needs
from engine.resolve import check_ranks, resolve
from models.hf.model import HfModel, build_model
from tests.jobs import job_of
from tests.models.hf_families import FAMILIES, add_tokenizer, load_hf, save
from tests.running import RunRanks, RunYoke
from tests.targets.hf import run, wanted_of
from tp.heads import split_heads

# What these hold whole: VaultGemma's table, which it scales; the latents of MiniCPM3's attention.
WHOLE = ("vaultgemma", "minicpm3")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 301, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokens: torch.Tensor) -> dict[str, str]:
    """A checkpoint of each family, with transformers' logits for `tokens` beside it."""
    made = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        with torch.no_grad():
            torch.save(save(name, folder)(tokens).logits, folder / "wanted.pt")
        made[name] = str(folder)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_eager_and_traced(name: str, folders: dict[str, str], tokens: torch.Tensor) -> None:
    """The same logits from the one graph that a compiler would be handed."""
    folder = Path(folders[name])
    model = load_hf(folder, Group(0, 1))
    rows = [0, 1, 2]
    wanted = wanted_of(torch.load(folder / "wanted.pt"), rows)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(run(model, tokens, rows), wanted, rtol=1e-4, atol=1e-4)
        step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        lengths = torch.tensor([9, 5, 7])
        wanted_tokens = torch.arange(3) * 12 + lengths - 1
        logits = step(tokens[:, :12], torch.arange(12).repeat(3, 1), wanted_tokens)
        torch.testing.assert_close(logits, wanted[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "comm"), [(2, "shm"), (3, "gloo")])
def test_ranks(size: int, comm: str, folders: dict[str, str], run_ranks: RunRanks) -> None:
    """Odd head counts, cut groups and replicated KV heads; batches of rows of different lengths. And
    each rank holds its part alone."""
    code, out, err = run_ranks("hf", size, comm, folders=folders)
    assert code == 0, err
    reports = [json.loads(line) for line in out.splitlines()]
    assert [line["name"] for line in reports] == list(FAMILIES)
    for line in reports:
        whole = (Path(folders[line["name"]]) / "model.safetensors").stat().st_size
        _, heads, kv_heads, *_ = FAMILIES[line["name"]]
        for rank, (held, cached) in enumerate(line["held"]):
            # Five heads on two ranks are three and two; norms and shared KV heads are on both.
            most = 0.75 if line["name"] in WHOLE else 1.35 / size
            assert held < most * whole, line
            own = split_heads(heads, kv_heads, rank, size).num_kv
            if line["name"] != "minicpm3":  # two layers, keys and values, 32 places, 16 float32
                assert cached == 2 * 2 * own * 32 * 16 * 4, line


@pytest.mark.slow
def test_the_command_compiled(tmp_path: Path, run_yoke: RunYoke) -> None:
    """Greedy text of two compiled ranks is that of `generate`, and no step is compiled twice."""
    from tokenizers import Tokenizer

    # One layer is enough to compile, and its window is shorter than the text.
    reference: Any = save("cohere2", tmp_path, num_hidden_layers=1, layer_types=["sliding_attention"])
    add_tokenizer(tmp_path)
    done = run_yoke(
        "--ranks=2", f"model={tmp_path}", "engine=hf", "prompt=Hello there", "max_new_tokens=12",
        "max_seq_len=64", "dtype=float32", "output=json", TORCH_LOGS="recompiles",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Recompiling" not in done.stderr
    made = json.loads(done.stdout)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("Hello there").ids])
    wanted = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )
    assert made["token_ids"] == wanted[0, prompt.shape[1] :].tolist()
    assert made["comm"] == "shm" and made["compile_s"] > 0


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SHAPE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
         "num_hidden_layers": 2, "vocab_size": 301, "intermediate_size": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"model_type": "gpt2"}, 1, r"GPT2LMHeadModel \(gpt2\) has no tensor-parallel plan"),
        ({"model_type": "olmoe"}, 2, r"OlmoeForCausalLM .* style '\w+' of model\.layers\.0\.mlp\.exp"),
        ({"model_type": "qwen3_5_text"}, 2, "layers of type linear_attention"),
        ({"model_type": "youtu"}, 2, "does not shard the attention of layers"),
        ({"model_type": "cohere2"}, 7, "7 ranks for 6 query heads"),
        ({"model_type": "arcee", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
          "rope_theta": 1e4}}, 2, "rotary scaling 'dynamic'"),
        ({"model_type": "cohere2", "num_attention_heads": "six"}, 2, "cannot build this model"),
        ({"model_type": "cohere2", "num_attention_heads": 5}, 2, "cannot build .* rotary dimension"),
        ({"model_type": "nobody", "auto_map": {"AutoConfig": "evil.Config"}}, 2, "cannot build"),
        ({"model_type": "cohere2", "num_hidden_layers": 2**40}, 2, "at most 4096 are allowed"),
        ({"model_type": "doge"}, 2, r"columns of .*\.self_attn\.dt_proj are not a multiple"),
        ({}, 2, "cannot build this model"),
    ],
)  # fmt: skip
def test_what_cannot_be_honored_is_named(
    config: dict[str, Any], size: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(InputError, match=message):
        build_model(write_config(tmp_path, **(SHAPE | config)), Group(0, size), torch.float32)


def test_weights_that_do_not_fit_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["starcoder2"], tmp_path / "model")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.c_proj.weight"
    for changed, message in (
        ({"more": weights[name]} | {k: v for k, v in weights.items() if k != name},
         f"lacks 1 weights of this model, such as '{name}' and holds 1 that it does not .* 'more'"),
        (weights | {name: weights[name][:-1].clone()}, f"{name} has shape"),
    ):  # fmt: skip
        save_file(changed, file)
        with pytest.raises(InputError, match=message):
            load_hf(folder, Group(0, 1))


def test_before_any_rank(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the command says without torch: heads, folders, the package."""
    words = ["prompt=x", "engine=hf"]
    job = resolve(job_of([f"model={folders['cohere2']}", *words]))
    check_ranks(job, 6)
    with pytest.raises(InputError, match="7 ranks for 6 query heads"):
        check_ranks(job, 7)
    assert job_needs(job, 2, thorough=True) == []
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"reads a folder with config\.json"):
        resolve(job_of([f"model={tmp_path}", *words]))
    with pytest.raises(InputError, match="weights=random goes with engine=yoke"):
        resolve(job_of(["model=tiny", "weights=random", *words]))
    own = resolve(job_of([f"model={folders['cohere2']}", "prompt=x"]))
    with pytest.raises(InputError, match=r"'Cohere2ForCausalLM' is not supported.*engine=hf runs any"):
        job_needs(own, 2, thorough=True)

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.51.3")
    with pytest.raises(InputError, match=r"needs transformers 5\.23 or newer, and 4\.51\.3"):
        resolve(job_of([f"model={folders['cohere2']}", *words]))
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(InputError, match=r"pip install 'transformers>=5\.23'"):
        resolve(job_of([f"model={folders['cohere2']}", *words]))


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
    ],
)
def test_stretched_contexts_have_their_length(scaling: dict[str, Any] | None, length: int) -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9,
        max_position_embeddings=64, **dict[str, Any](rope_scaling=scaling),
    )  # fmt: skip
    with torch.device("meta"):
        inner = LlamaForCausalLM(config)
    assert HfModel(inner, (None, None), []).max_seq_len == length

"""Logits of which nothing can follow end a run: what was chosen before may be shown, nothing after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from base.errors import InputError
from comm.group import Group
from engine import speculation
from engine.loop import Watcher, generate
from engine.requests import Request
from engine.steps import Runner, make_runner
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.presets import PRESETS
from models.reference import generate as plain_loop
from models.sampling import Sampling
from tests.quantize.small import make_folder
from tests.running import RunYoke
from tests.tensors import tensors_of
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

ALONE = Group(0, 1)
CONFIG = PRESETS["tiny"]
PROMPT, COUNT = (5, 9, 2), 12


def model() -> Decoder:
    return load_model(CONFIG, random_checkpoint(expected_shapes(CONFIG), 1), ALONE, torch.float32)


def poison(model: Decoder, value: float, step: int) -> None:
    """From that step on (0 is the prompt's) a logit is `value`; minus infinity: all are."""
    local, calls = model.head.local, [0]

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        logits = local(x)
        calls[0] += 1
        if calls[0] > step:
            logits[:, slice(None) if value == -torch.inf else slice(7, 8)] = value
        return logits

    model.head.local = poisoned  # type: ignore[method-assign]


def run(way: str, runner: Runner, requests: list[Request], watcher: Watcher) -> None:
    if way == "loop":
        generate(runner, requests, watcher=watcher)
    else:
        speculation.generate(runner, requests, watcher=watcher, draft_tokens=3)


def keeping(shown: list[int]) -> Watcher:
    """Puts every token that is shown into `shown`."""

    def on_token(request: int, token: int) -> bool:
        shown.append(token)
        return False

    return Watcher(on_token)


@pytest.mark.parametrize("way", ["loop", "lookup", "sampled"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_is_shown_from_there_on(value: float, step: int, way: str) -> None:
    sampling = Sampling(temperature=1.0, seed=5) if way == "sampled" else Sampling()
    wanted = plain_loop(model(), ALONE, list(PROMPT), COUNT, sampling=sampling)
    broken = model()
    poison(broken, value, step)
    shown: list[int] = []
    watcher = keeping(shown)
    request = Request(PROMPT, COUNT, sampling, name="line 4")
    with pytest.raises(InputError, match=f"largest logit of line 4.* is {value}, not a finite number"):
        run(
            "loop" if way == "sampled" else way,
            make_runner(broken, ALONE, 64, compiled=False, num_rows=2),
            [request],
            watcher,
        )
    assert shown == wanted[: len(shown)]
    assert len(shown) >= step if way == "lookup" else len(shown) == step


def test_the_request_that_has_them_is_named_and_the_others_are_as_ever() -> None:
    """One token's embedding is damaged: whoever has it in the prompt, or makes it, is meant."""
    other = [8, 8]
    wanted = plain_loop(model(), ALONE, other, COUNT)
    token = next(t for t in range(CONFIG.vocab_size) if t not in (*other, *wanted))
    broken = model()
    broken.embed.weight[token] = torch.nan
    requests = [Request(tuple(other), COUNT, name="a"), Request((3, token), COUNT, name="b")]
    runner = make_runner(broken, ALONE, 64, compiled=False, num_rows=2)
    with pytest.raises(InputError, match="largest logit of b, after 0 tokens, is nan"):
        generate(runner, requests)
    assert list(generate(runner, requests[:1])[0].tokens) == wanted


def test_a_masked_vocabulary_is_no_mistake() -> None:
    wanted = plain_loop(model(), ALONE, list(PROMPT), COUNT)
    masked = model()
    allowed = sorted({*wanted, 0, 1})
    local = masked.head.local

    def some(x: torch.Tensor) -> torch.Tensor:
        kept = torch.full((x.shape[0], CONFIG.vocab_size), -torch.inf)
        kept[:, allowed] = local(x)[:, allowed]
        return kept

    masked.head.local = some  # type: ignore[method-assign]
    answer = generate(make_runner(masked, ALONE, 64, compiled=False), [Request(PROMPT, COUNT)])[0]
    assert list(answer.tokens) == wanted


def test_a_draft_model_that_is_damaged_is_named() -> None:
    """It could only cost time: the texts are the model's. But nobody wants to keep such a file."""
    draft = model()
    poison(draft, torch.nan, 1)
    runners = [make_runner(part, ALONE, 64, compiled=False) for part in (model(), draft)]
    shown: list[int] = []
    watcher = keeping(shown)
    with pytest.raises(InputError, match="largest logit of the draft model for the prompt is nan"):
        speculation.generate(runners[0], [Request(PROMPT, COUNT)], watcher=watcher, draft=runners[1])
    assert shown == plain_loop(model(), ALONE, list(PROMPT), COUNT)[: len(shown)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder in which the embedding of some token of the answer to "ab" is not a number, and that
    answer up to it."""
    folder = make_folder(tmp_path_factory.mktemp("damaged") / "model")
    checkpoint = open_checkpoint(folder)
    whole = load_model(config_of(checkpoint), checkpoint, ALONE, torch.float32)
    made = plain_loop(whole, ALONE, [97, 98], 8)
    last = next(i for i, t in enumerate(made) if t not in {97, 98, *made[:i]} and i > 0)
    tensors = tensors_of(folder)
    tensors["model.embed_tokens.weight"][made[last]] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, made[: last + 1]


@pytest.mark.parametrize("comm", ["shm", "gloo"])
def test_the_command_says_so(
    comm: str, damaged: tuple[Path, list[int]], tmp_path: Path, run_yoke: RunYoke
) -> None:
    folder, good = damaged
    words = (f"model={folder}", "compile=false", "dtype=float32", "max_new_tokens=8", "max_seq_len=64")
    file = tmp_path / "prompts.txt"
    file.write_text(f"ab\na{chr(good[-1])}\n")
    asked = "prompt=ab" if comm == "shm" else f"prompts={file}"
    done = run_yoke("--ranks=2", f"--comm={comm}", *words, asked)
    assert done.returncode == 2, done.stderr
    where = f"the prompt, after {len(good)}" if comm == "shm" else f"{file} line 2, after 0"
    assert f"largest logit of {where} tokens, is nan, not a finite number" in done.stderr
    assert done.stderr.count("error: ") == 1
    # This tokenizer has a space between any two tokens.
    assert done.stdout == (" ".join(map(chr, good)) if comm == "shm" else "")

"""The whole path in seconds: the command, two bound ranks, shared memory, against the plain loop."""

from __future__ import annotations

import json

import torch

from comm.group import Group
from models.config import expected_shapes
from models.load import load_model
from models.presets import PRESETS
from models.reference import generate
from tests.running import RunYoke
from weights.formats.random_io import random_checkpoint

PROMPT = "hello"


def test_two_ranks_make_the_tokens_of_the_plain_loop(run_yoke: RunYoke) -> None:
    done = run_yoke(
        "--ranks", "2", "--bind-cores-to-rank", "model=tiny", "weights=random", "dtype=float32",
        "compile=false", "max_new_tokens=6", "output=json", f"prompt={PROMPT}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = PRESETS["tiny"]
    model = load_model(
        config, random_checkpoint(expected_shapes(config), 0), Group(0, 1), torch.float32
    )
    prompt = [byte % config.vocab_size for byte in PROMPT.encode()]
    assert json.loads(done.stdout)["token_ids"] == generate(model, Group(0, 1), prompt, 6)

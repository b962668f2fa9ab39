"""What the last line of a run says about compiling."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from comm.group import Group
from engine.background import Upgrade
from engine.ready import Ready, compile_state
from engine.steps import EXTEND, GREEDY, make_runner
from models.decoder import Decoder
from models.presets import PRESETS

MODEL = Decoder(replace(PRESETS["tiny"], num_layers=1), Group(0, 1))


def upgrade(packages: tuple[str, ...], done_s: dict[str, float], failed: list[str]) -> Upgrade:
    runner = make_runner(MODEL, Group(0, 1), 16, compiled=False)
    paths = {name: Path(name) for name in packages}
    return Upgrade(runner, MODEL, paths, None, None, 0.0, ExitStack(), done_s=done_s, failed=failed)


@pytest.mark.parametrize(
    ("packages", "done_s", "failed", "waited_s", "words"),
    [
        ((), {GREEDY: 0.1, EXTEND: 0.2}, [], 0.0, "compile 0.0 s"),
        ((), {GREEDY: 30.0, EXTEND: 41.4}, [], 0.0, "compiled after 41 s"),
        ((), {GREEDY: 30.0, EXTEND: 41.4}, [], 41.9, "compile 41.9 s"),
        ((EXTEND,), {GREEDY: 30.0}, [], 0.0, "extend not compiled yet"),
        ((), {GREEDY: 30.0}, [EXTEND], 0.0, "extend uncompiled"),
    ],
)
def test_the_state_in_words(
    packages: tuple[str, ...],
    done_s: dict[str, float],
    failed: list[str],
    waited_s: float,
    words: str,
) -> None:
    ready = Ready((), (), compile_s=waited_s, upgrades=(upgrade(packages, done_s, failed),))
    assert compile_state(ready, "auto") == words
    assert compile_state(ready, "false") == "uncompiled"

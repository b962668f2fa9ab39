"""What runs in the processes that tests start: a module of tests/targets, whose failed asserts report
their values, as those of a test do.

`launch` runs `main` in a rank. `python -m tests.child MODULE CASE [WORDS]` runs a case of a module that
forks its ranks itself.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType
from typing import Any

from _pytest.assertion import install_importhook
from _pytest.config import get_config

from base.rank_settings import RankSettings


def target(name: str) -> ModuleType:
    """tests.targets.NAME, its asserts rewritten as pytest rewrites those of its own process."""
    install_importhook(get_config()).mark_rewrite("tests.targets")
    return importlib.import_module(f"tests.targets.{name}")


def pack(name: str, payload: dict[str, Any]) -> str:
    """The payload of `main`."""
    return json.dumps({"target": name, "payload": json.dumps(payload)})


def main(env: RankSettings, payload: str) -> int:
    words = json.loads(payload)
    return int(target(words["target"]).main(env, words["payload"]))


if __name__ == "__main__":
    module, case, *words = sys.argv[1:]
    target(module).CASES[case](*words)

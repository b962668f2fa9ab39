"""The settings of a rank: the launcher makes what the packages that ranks run declare to use."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from base.rank_settings import RankPlace, RankSettings
from launcher.child import RankEnv
from launcher.plan import RankPlan

CHECKOUT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("declared", "made"), [(RankSettings, RankEnv), (RankPlace, RankPlan)])
def test_the_launcher_makes_every_field_that_is_declared(declared: type, made: type) -> None:
    names = {name for name, value in vars(declared).items() if isinstance(value, property)}
    assert names
    assert names <= {field.name for field in fields(made)} | set(dir(made))


def test_every_function_that_takes_them_declares_them() -> None:
    found = set()
    for room in ("base", "launcher", "comm", "engine", "quantize", "bench"):
        for file in (CHECKOUT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.arg) and node.arg == "env" and node.annotation is not None:
                    found.add(ast.unparse(node.annotation))
    assert found == {"RankSettings", "RankEnv"}

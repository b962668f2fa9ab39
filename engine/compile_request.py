"""What a rank asks of the process that compiles for it; a module that both can import by its name."""

from __future__ import annotations

from dataclasses import dataclass

from engine.packages import StepShape


@dataclass(frozen=True)
class CompileRequest:
    """`model`: its description. `packages`: where the package of each step goes, by the step's name.
    `niceness` is added to the process's. `collectives`: the model's ranks communicate."""

    model: bytes
    shape: StepShape
    packages: dict[str, str]
    num_threads: int
    niceness: int
    collectives: bool

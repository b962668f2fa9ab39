"""A trial of the placement: ranks bind, touch some memory, check where its pages are, and end.

`doctor` shows the result. It does not load torch, so it takes a fraction of a second.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from base.rank_settings import RankSettings
from launcher.placement import Placement, check_placement
from launcher.plan import LaunchPlan
from launcher.spawn import RunOptions, launch, new_session

_TOUCHED_BYTES = 32 << 20


def main(env: RankSettings, payload: str) -> int:
    """In each rank: write the rank's `Placement` as JSON into the folder `payload`."""
    block = bytearray(b"\1") * _TOUCHED_BYTES
    found = check_placement(env.rank, env.plan.nodes, env.plan.cpus)
    assert len(block) == _TOUCHED_BYTES
    (Path(payload) / f"{env.rank}.json").write_text(json.dumps(asdict(found)))
    return 0


def try_placement(plan: LaunchPlan) -> tuple[Placement, ...]:
    """Start the ranks of a plan that binds, and return their placements. Raises LaunchError, or
    RuntimeError if a rank failed (the rank has then printed why)."""
    with tempfile.TemporaryDirectory(prefix="yoke-") as folder:
        options = RunOptions(start_timeout_s=30.0, hang_timeout_s=30.0)
        code = launch(plan, options, new_session(), "launcher.doctor.selfcheck", folder)
        if code:
            raise RuntimeError(f"a trial of the placement ended with exit code {code}")
        return tuple(
            placement_of(json.loads((Path(folder) / f"{rank.rank}.json").read_text()))
            for rank in plan.ranks
        )


def placement_of(data: dict[str, Any]) -> Placement:
    """The inverse of `asdict`, also after a round trip through JSON."""
    by_node = {int(node): size for node, size in data["pages_by_node"].items()}
    tuples = {key: tuple(data[key]) for key in ("nodes", "cpus", "stray_threads")}
    return Placement(**(data | tuples | {"pages_by_node": by_node}))

"""How long until the first token? `python bench/first_hour.py [N]`: N rounds (3), an empty cache each.

    operators       from the start of `make demo`'s command to its first token, nothing cached: the C++
                    operators are built; steps run uncompiled                                limit 45 s
    second start    the same command again: operators are there, steps are still compiled during the run
    waits           the same command with compile=true: until the first token of compiled steps
    compiled        and again: compiled steps are loaded from disk
    new model       a 1B model of random weights, for the first time: from its weights being loaded to
                    its first token                                                          limit 10 s
    beside          not seconds: the speed of 600 tokens while steps are compiled beside them, over that
                    of uncompiled steps alone                                        limit 0.5, or more

The first token is the first byte on standard output. pip's work is not measured: run it after `make
setup`. Prints best and median; the last line is JSON. What is not here: tokens per second
(`bench/decode.py`), the launcher's own time (`bench/startup.py`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from bench.startup import hardware_name

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO = ("model=smollm2-135m", "prompt=The capital of France is", "max_new_tokens=32")
NEW = ("model=llama-3.2-1b", "weights=random", "prompt=hello", "max_new_tokens=8")
LIMITS_S = {"operators": 45.0, "second start": None, "waits": None, "compiled": None, "new model": 10.0,
            "beside": 0.5}  # fmt: skip
LONG = (
    "model=smollm2-135m",
    "prompt=Once upon a time there was a",
    "max_new_tokens=600",
    "output=json",
)


@dataclass(frozen=True)
class Start:
    """When things happened, in seconds from the start of the command. `loaded`: the first step ran."""

    loaded: float
    first_token: float
    end: float
    out: str


def main(num_rounds: int) -> int:
    times: dict[str, list[float]] = {name: [] for name in LIMITS_S}
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory(prefix="yoke-bench-") as cache:
            times["operators"].append(start(cache, *DEMO).first_token)
            times["second start"].append(start(cache, *DEMO).first_token)
            times["beside"].append(speed_beside(cache))
            times["waits"].append(start(cache, *DEMO, "compile=true").first_token)
            times["compiled"].append(start(cache, *DEMO).first_token)
            new = start(cache, *NEW)
            times["new model"].append(new.first_token - new.loaded)
    hardware = hardware_name()
    print(f"{hardware}\n{num_rounds} rounds; seconds to the first token")
    print(f"{'':<14}{'best':>8}{'median':>8}{'limit':>8}")
    results = {}
    for name, seconds in times.items():
        best = max(seconds) if name == "beside" else min(seconds)
        median, limit = statistics.median(seconds), LIMITS_S[name]
        print(f"{name:<14}{best:8.2f}{median:8.2f}{limit or '':>8}")
        results[name] = {"best_s": round(best, 2), "median_s": round(median, 2), "limit_s": limit}
    print(json.dumps({"hardware": hardware, "rounds": num_rounds, "results": results}))
    return 0


def start(cache: str, *words: str) -> Start:
    """Run the command on two ranks with `cache` as the user's cache folder."""
    command = [sys.executable, "launch.py", "--bind-cores-to-rank", "--ranks", "2", *words]
    began = time.monotonic()
    loaded: list[float] = []
    errors: list[str] = []
    with subprocess.Popen(
        command, cwd=CHECKOUT, env={**os.environ, "XDG_CACHE_HOME": cache}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip

        def follow() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                errors.append(line)
                if line.startswith(("running once:", "compiling:")) and not loaded:
                    loaded.append(time.monotonic() - began)

        thread = threading.Thread(target=follow)
        thread.start()
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_token = time.monotonic() - began
        out = first + process.stdout.read()
        thread.join()
    if process.returncode or not first or not loaded:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(errors)}")
    return Start(loaded[0], first_token, time.monotonic() - began, out)


def speed_beside(cache: str) -> float:
    """Tokens per second while the compiler works beside them, over those of uncompiled steps alone. No
    step of 600 tokens is compiled yet: the first runs ended before."""
    beside, alone = (json.loads(start(cache, *LONG, f"compile={how}").out) for how in ("auto", "false"))
    if "not compiled yet" not in beside["compiled"]:
        sys.exit(f"600 tokens took longer than compiling: {beside['compiled']}")
    return float(alone["tpot_s"] / beside["tpot_s"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))

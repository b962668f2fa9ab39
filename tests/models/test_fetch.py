"""Models are fetched from a hub: a server on this machine that speaks its API."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from base.errors import InputError
from models.fetch import Offer, _require_space
from models.hub import Needed, Reference
from tests.models.hub_server import COMMIT, Hub, serving
from tests.running import CHECKOUT, yoke

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
PROGRAM = """
import sys
from base.errors import InputError
from tests.jobs import job_of
from engine.resolve import resolve
try:
    print(resolve(job_of(sys.argv[1:])).checkpoint)
except InputError as error:
    sys.exit(str(error))
"""


def safetensors(name: str, size: int) -> bytes:
    entry = {name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    return struct.pack("<Q", len(header)) + header + bytes([7]) * size


def sharded() -> dict[str, bytes]:
    """Two shards with their index, and what else repositories hold."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b'{"a": 1}',
        "additional_chat_templates/tool.jinja": b"{{ 1 }}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        names[0]: safetensors("a", 1000),
        names[1]: safetensors("b", 24 << 20),
        "README.md": b"# a model",
        "consolidated.safetensors": safetensors("c", 5000),
        "original/consolidated.00.pth": b"the same again",
        "pytorch_model.bin": b"the same again",
        "onnx/model.onnx": b"the same again",
    }


WANTED = list(sharded())[:6]


def environment(hub: Hub, cache: Path) -> dict[str, Any]:
    return {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0",
        "HF_TOKEN_PATH": str(cache / "token"), "no_proxy": "*",
    }  # fmt: skip


def resolve(hub: Hub, cache: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What `engine.resolve` finds, in a process of its own: the library reads its variables once."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "prompt=x", *words],
        capture_output=True, text=True, timeout=120, cwd=CHECKOUT, stdin=subprocess.DEVNULL,
        env={**os.environ, **environment(hub, cache), **env},
    )  # fmt: skip


def held(cache: Path) -> dict[str, bytes]:
    snapshot = cache / "models--some--model" / "snapshots" / COMMIT
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    return {str(file.relative_to(snapshot)): file.read_bytes() for file in files}


def test_what_is_needed_is_fetched_and_a_broken_download_goes_on(tmp_path: Path) -> None:
    files = sharded()
    large = WANTED[-1]
    with serving(Hub("some/model", files, breaks={large: 1})) as hub:
        done = resolve(hub, tmp_path, "model=some/model", "fetch=true")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith(COMMIT)
        assert "fetching some/model from" in done.stderr and ": 6 files, 24." in done.stderr
        assert held(tmp_path) == {name: files[name] for name in WANTED}
        # The connection broke in the middle: what had come was not fetched again.
        assert [name for name, _ in hub.ranges] == [large] and hub.ranges[0][1] != "bytes=0-"
        assert sorted(hub.fetched) == sorted([*WANTED, large])
        again = resolve(hub, tmp_path, "model=some/model")
        assert again.stdout == done.stdout and again.stderr == ""
    gone = resolve(hub, tmp_path, "model=some/model", "fetch=true")  # no server is needed any more
    assert gone.stdout == done.stdout, gone.stderr


def test_an_incomplete_download_is_said_and_completed(tmp_path: Path) -> None:
    files = sharded()
    part = {name: data for name, data in files.items() if name != WANTED[-1]}
    with serving(Hub("some/model", files)) as hub:
        assert resolve(hub, tmp_path, "model=some/model", "fetch=true").returncode == 0
        (tmp_path / "models--some--model" / "snapshots" / COMMIT / WANTED[-1]).resolve().unlink()
        done = resolve(hub, tmp_path, "model=some/model")
        assert done.returncode == 1 and f"{WANTED[-1]} is missing" in done.stderr
        assert "fetch=true fetches the rest" in done.stderr
        hub.fetched.clear()
        done = resolve(hub, tmp_path, "model=some/model", "fetch=true")
        assert done.returncode == 0, done.stderr
        assert hub.fetched == [WANTED[-1]] and ": 1 file, 24.0 MiB" in done.stderr
    with serving(Hub("some/model", part)) as hub:
        lacking = resolve(hub, tmp_path / "other", "model=some/model", "fetch=true")
        assert f"names {WANTED[-1]}, which is not there" in lacking.stderr


def test_one_gguf_file_of_many_is_fetched(tmp_path: Path) -> None:
    names = ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "big/m-F16-00001-of-00002.gguf", "mmproj-m-f16.gguf"]
    names.append(names[2].replace("00001", "00002"))
    with serving(Hub("some/model", {name: name.encode() for name in names})) as hub:
        unclear = resolve(hub, tmp_path, "model=some/model:*Q*", "fetch=true")
        assert "could mean 2 GGUF files: m-Q4_K_M.gguf, m-Q8_0.gguf" in unclear.stderr
        absent = resolve(hub, tmp_path, "model=some/model:Q5", "fetch=true")
        assert "no GGUF file of some/model is named 'Q5'; it holds" in absent.stderr
        assert hub.fetched == []
        done = resolve(hub, tmp_path, "model=some/model:q4_k_m", "fetch=true")
        assert done.stdout.strip().endswith(names[0]) and hub.fetched == names[:1], done.stderr
        both = resolve(hub, tmp_path, "model=some/model:F16", "fetch=true")
        assert both.stdout.strip().endswith(names[2]), both.stderr
        assert sorted(hub.fetched[1:]) == [names[2], names[4]]
        assert resolve(hub, tmp_path, f"model=some/model:{names[0]}").stdout == done.stdout
        assert "fetch=true" in resolve(hub, tmp_path, "model=some/model:Q8_0").stderr


def test_a_token_comes_from_its_variable_or_its_file(tmp_path: Path) -> None:
    files = {"m.gguf": b"GGUF"}
    with serving(Hub("some/model", files, token="hf_abc")) as hub:
        words = ("model=some/model", "fetch=true")
        none = resolve(hub, tmp_path, *words)
        assert "some/model is gated: accept its license there" in none.stderr
        assert resolve(hub, tmp_path, *words, HF_TOKEN="hf_abc").returncode == 0
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "token").write_text("hf_abc\n")
        filed = resolve(hub, tmp_path / "b", *words)
        assert filed.returncode == 0, filed.stderr


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, ""), "there is no such repository, or it is private"),
        ((404, "RepoNotFound"), "there is no such repository, or it is private"),
        ((403, "GatedRepo"), "is gated: accept its license there"),
        ((503, ""), "the hub answers with HTTP status 503; try again later"),
        (None, "cannot be reached"),
    ],
)
def test_a_refusal_is_one_message_before_any_rank(
    refusal: tuple[int, str] | None, said: str, tmp_path: Path
) -> None:
    hub = Hub("some/model", {}, refusal=refusal, url="http://127.0.0.1:9")  # nothing listens there
    if refusal is None:
        done = yoke("model=some/model", "prompt=x", "fetch=true", **environment(hub, tmp_path))
    else:
        with serving(hub):
            done = yoke("model=some/model", "prompt=x", "fetch=true", **environment(hub, tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


def test_nothing_is_fetched_unasked(tmp_path: Path) -> None:
    with serving(Hub("some/model", {"m.gguf": b"GGUF"})) as hub:
        for words in (["model=some/model"], ["model=some/model", "fetch=false"]):
            done = resolve(hub, tmp_path, *words)
            assert done.returncode == 1 and "fetch=true downloads it from" in done.stderr
        assert hub.fetched == [] and not any(tmp_path.iterdir())


def test_a_terminal_asks(tmp_path: Path) -> None:
    with serving(Hub("some/model", {"m.gguf": b"GGUF" * 1000})) as hub:
        for key, there in ("n", False), ("y", True):
            child = pexpect.spawn(
                sys.executable, ["-c", PROGRAM, "prompt=x", "model=some/model"], cwd=str(CHECKOUT),
                env={**os.environ, **environment(hub, tmp_path)}, timeout=60, dimensions=(24, 200),
            )  # fmt: skip
            child.expect_exact("model=some/model is not here. Fetch some/model from")
            child.expect_exact(f": 1 file, 3.9 KiB, into {tmp_path}? [y/N] ")
            assert not (tmp_path / "models--some--model").exists()
            child.sendline(key)
            child.expect_exact("4.00kB / 4.00kB" if there else "there is no such path")  # the bar
            child.expect(pexpect.EOF)
            child.close()
            assert (child.exitstatus == 0) == there and (hub.fetched == ["m.gguf"]) == there


def test_a_plan_needs_the_config_alone(tmp_path: Path) -> None:
    with serving(Hub("some/model", sharded())) as hub:
        env = environment(hub, tmp_path)
        words = ("plan", "--ranks", "2", "model=some/model", "max_seq_len=100")
        assert yoke(*words, **env).returncode == 2
        fetched = yoke(*words, "fetch=true", **env)
        assert fetched.returncode == 0, fetched.stderr
        assert set(held(tmp_path)) == set(WANTED[:4])
        planned = yoke(*words, **env)
        assert planned.stdout == fetched.stdout and "its weights are not here" in planned.stdout
        # 2 * (512 * 64) of embedding and head; a rank has half of all but the norms.
        layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
        weights = 2 * (512 * 64 + 2 * layer // 2 + 5 * 64)
        assert f"weights {weights / 1024:.1f} KiB" in planned.stdout
        assert set(held(tmp_path)) == set(WANTED[:4])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_download_is_stopped_at_once_and_leaves_no_part(
    number: signal.Signals, tmp_path: Path
) -> None:
    files = {"config.json": b"{}", "model.safetensors": safetensors("a", 24 << 20)}
    with serving(Hub("some/model", files, stuck=("model.safetensors",))) as hub:
        process = subprocess.Popen(
            [sys.executable, str(CHECKOUT / "launch.py"), "model=some/model", "prompt=x", "fetch=true"],
            env={**os.environ, **environment(hub, tmp_path)}, stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(
            lambda: "model.safetensors" in hub.fetched and list(tmp_path.rglob("*.incomplete")), process
        )
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1].startswith(
        f"stopped by {number.name}; files that are complete are kept"
    )
    assert "Traceback" not in err
    assert set(held(tmp_path)) == {"config.json"} and not list(tmp_path.rglob("*.incomplete"))


def wait_for(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not found():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def test_a_full_disk_is_said_before_the_download(tmp_path: Path) -> None:
    offer = Offer(
        Reference("o/n"), Needed((), ("m.gguf",)), {"m.gguf": 1 << 60}, tmp_path / "a", ("m.gguf",)
    )
    with pytest.raises(InputError, match="GiB that are free there; set HF_HOME"):
        _require_space(offer)

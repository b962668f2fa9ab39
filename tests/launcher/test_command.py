"""The command by its names: `python launch.py` with any Python, `yoke` in any folder; help, hints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from base.venv import PACKAGES, why_continued
from engine.job import KEYS
from launcher.flags import COMMANDS, UnknownFlagError, parse_flags
from tests.running import CHECKOUT, RunYoke

LAUNCH = str(CHECKOUT / "launch.py")


def outcome(words: list[str], folder: Path, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without packages."""
    if not (CHECKOUT / ".venv/bin/python").exists():
        pytest.skip("this checkout has no .venv")
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


def test_a_python_without_packages_goes_on_in_the_checkouts_own(bare: str, tmp_path: Path) -> None:
    code, out, err = outcome([bare, LAUNCH, "models", "tiny", "--verbose"], tmp_path)
    assert code == 0, err
    assert "tiny" in out
    assert (
        err
        == f"note: {bare} lacks {', '.join(PACKAGES)}: continuing with {CHECKOUT}/.venv/bin/python\n"
    )
    assert outcome([bare, LAUNCH, "models", "tiny"], tmp_path)[::2] == (0, "")
    code, _, err = outcome([bare, "-m", "tp.reshard", "-v", "--to", "1", "no", "out"], CHECKOUT)
    assert code == 2
    assert err.startswith("note: ") and err.endswith("no does not exist; give the path of a file\n")


def test_it_goes_on_once(bare: str, tmp_path: Path) -> None:
    code, _, err = outcome([bare, LAUNCH, "models"], tmp_path, YOKE_CONTINUED="by another")
    assert (code, err) == (2, "error: the package omegaconf is missing; run: make setup\n")


def test_the_mark_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOKE_CONTINUED", "a reason")
    assert (why_continued(), why_continued()) == ("a reason", "")


def test_a_program_keeps_its_python(bare: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.executable)\n")
    assert outcome([bare, LAUNCH, "run", "--ranks", "1", str(script)], tmp_path) == (0, f"{bare}\n", "")


def test_the_packages_are_those_of_the_project() -> None:
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    assert sorted(PACKAGES) == sorted(name.partition(">")[0] for name in needed)


def test_yoke_works_in_any_folder_and_through_links(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "yoke"
    command.symlink_to(CHECKOUT / "yoke")
    assert outcome([str(command), "--version"], tmp_path)[1].startswith("yoke 0.")
    code, out, err = outcome([str(command), "plan", "--json", "--ranks", "1"], tmp_path)
    assert code == 0 and '"ranks"' in out, err
    code, _, err = outcome([str(command), "reshard", "--from", "8", "--to", "16"], tmp_path)
    assert code == 2
    assert "\n  yoke reshard --from 8 --to 16 llama-2-70b/ llama-2-70b-16/\n" in err
    code, _, err = outcome([str(command), "--ranks", "2", "reshard", "--to", "1"], tmp_path)
    assert code == 2 and "leave out --ranks 2" in err


def test_make_puts_yoke_where_it_is_found(tmp_path: Path) -> None:
    for name in ("Makefile", "yoke"):
        shutil.copy(CHECKOUT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    prefix = tmp_path / "a prefix"
    make = ["make", "-s", "-o", ".venv/.torch-choice", "-o", ".venv/.runtime"]
    code, out, err = outcome([*make, ".venv/bin/yoke", "install", f"PREFIX='{prefix}'"], tmp_path)
    assert code == 0, err
    assert f"add {prefix}/bin to your PATH" in out
    for link in (tmp_path / ".venv/bin/yoke", prefix / "bin/yoke"):
        assert link.resolve() == tmp_path / "yoke" and os.access(link, os.X_OK)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, run_yoke: RunYoke) -> None:
    done = run_yoke(command, "--help", YOKE_NAME="yoke")
    assert done.returncode == 0, done.stderr
    usage, _, examples = done.stdout.partition("examples:\n")
    assert (
        usage.split("\n")[0].startswith(("yoke ", "usage: yoke ")) and command in usage.split("\n")[0]
    )
    assert f"yoke {command}" in examples or command == "generate"
    assert "python" not in examples.replace("| python", "")
    keys = {line.split("=")[0].strip() for line in done.stdout.splitlines() if line[2:3].isalpha()}
    assert ("temperature" in keys) == (command in ("generate", "chat", "plan"))
    assert ("prompt" in keys) == (command in ("generate", "plan"))


def test_the_help_of_all_names_each_command(run_yoke: RunYoke) -> None:
    shown = run_yoke("--help").stdout
    assert "COMMAND --help" in shown and "python launch.py" in shown
    assert all(f"\n  {name}" in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--bind-cores-to-ranks model=x", "--bind-cores-to-ranks, did you mean --bind-cores-to-rank?"),
        ("--bind_core_to_rank", "--bind_core_to_rank, did you mean --bind-cores-to-rank?"),
        ("--model X", "there is no flag --model, did you mean model=X?"),
        ("--model=X", "there is no flag --model, did you mean model=X?"),
        ("--model prompt=x", "there is no flag --model, did you mean model=...?"),
        ("model=x --promt=hi", "there is no flag --promt, did you mean prompt=hi?"),
        ("model=x --max-new-tokens 5", "did you mean max_new_tokens=5?"),
        ("run --rank 3 x.py", "there is no flag --rank, did you mean --ranks?"),
        ("--qqq", "there is no flag --qqq; see --help"),
    ],
)  # fmt: skip
def test_a_flag_that_is_misspelt(words: str, hint: str) -> None:
    argv = words.split()
    with pytest.raises(UnknownFlagError) as raised:
        parse_flags(argv)
    assert hint in raised.value.message(KEYS, argv)


def test_a_misspelt_flag_is_one_message(run_yoke: RunYoke) -> None:
    done = run_yoke("--model", "llama-8b")
    assert done.returncode == 2
    assert done.stderr == "error: there is no flag --model, did you mean model=llama-8b? See --help\n"
    assert "did you mean 'chat'" in run_yoke("chta", "model=x").stderr


def test_the_last_word_of_a_key_counts(run_yoke: RunYoke) -> None:
    job = ["model=tiny", "weights=random", "prompt=x"]
    assert parse_flags(["device=cuda", *job, "device=cpu", "seed="]).given == {
        "device": "cpu", "model": "tiny", "weights": "random", "prompt": "x", "seed": "",
    }  # fmt: skip
    done = run_yoke("plan", "--ranks", "1", "device=cuda", *job, "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "device=cuda: " in run_yoke("plan", "device=cpu", *job, "device=cuda").stderr

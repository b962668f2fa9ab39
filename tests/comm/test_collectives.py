"""The collectives between real processes: the launcher's, and such as are forked in one go."""

from __future__ import annotations

from pathlib import Path

import pytest

from comm.sources import read_level
from tests.running import RunRanks, run_case


def test_random_sequences_in_worlds_of_1_to_8() -> None:
    """All operators, dtypes, sizes, views and `out` forms; two alternating groups, and gloo."""
    run_case("sequences", "worlds")


def test_sixty_four_ranks() -> None:
    run_case("extremes", "many_ranks")


def test_messages_of_64_mib() -> None:
    run_case("extremes", "large_messages")


def test_two_groups_at_once_from_two_threads() -> None:
    run_case("sequences", "threads")


def test_what_cannot_be_is_refused_and_the_group_goes_on() -> None:
    run_case("extremes", "refusals")


@pytest.fixture(scope="module")
def compared() -> list[str]:
    """The instruction sets that gave the same bits."""
    return run_case("extremes", "instruction_sets").split()


@pytest.mark.parametrize(("level", "name"), [*enumerate(("base", "avx2", "avx512", "avx512bf16"))])
def test_every_instruction_set_gives_the_same_bits(level: int, name: str, compared: list[str]) -> None:
    if level > read_level():
        pytest.skip(f"{name} does not run on this processor")
    assert name in compared


def test_four_ranks_on_few_cores_do_not_crawl() -> None:
    """A loose bound: one that waits for the scheduler takes tens of milliseconds."""
    print(run_case("extremes", "latency"))


@pytest.mark.parametrize("size", [1, 3])
def test_shared_memory_is_exact(size: int, run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("collectives", size, "shm")
    assert code == 0, err


def test_gloo_gives_the_same_sums(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("collectives", 2, "gloo")
    assert code == 0, err


def test_torch_accepts_the_operators_and_compiles_them(run_ranks: RunRanks) -> None:
    """opcheck; one graph of a block, with its collectives and no copies around them; `out` forms."""
    cases = ["operators", "block", "functions"]
    code, out, err = run_ranks("traced", 2, "shm", cases=cases)
    assert code == 0, err
    assert out.split() == cases


@pytest.mark.parametrize("case", ["join", "late"])
def test_a_rank_that_does_not_come_is_named(case: str, run_ranks: RunRanks, tmp_path: Path) -> None:
    code, out, err = run_ranks("timeouts", 3, "shm", case=case, folder=str(tmp_path))
    assert code == 0, err
    assert f"rank 0 waited {'2.5' if case == 'join' else '1.5'} s for rank 1" in out
    assert ("pid" in out) == (case == "late")
    # While the ranks gather, the segment has a name, and nobody else may open it.
    assert ("[rank 1] ['mode 600']" in out) == (case == "join")
    assert "[rank 2]" in out


def test_ranks_that_call_different_operators_get_an_error(run_ranks: RunRanks, tmp_path: Path) -> None:
    code, out, err = run_ranks("timeouts", 2, "shm", case="mismatch", folder=str(tmp_path))
    assert code == 0, err
    assert "rank 0 calls all_reduce with 8 elements" in out
    assert "rank 1 calls all_reduce with 9 elements" in out


def test_without_a_compiler_gloo_takes_over(
    run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    code, _, err = run_ranks("fallback", 2, "shm")
    assert code == 0, err
    assert err.count("using gloo, which is slower") == 1
    assert "/nonexistent/compiler" in err

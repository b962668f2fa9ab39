"""Steps that are compiled during the run: ranks change to them together, with the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_compiling import cache_with_extensions
from tests.running import RunRanks


@pytest.mark.slow
def test_ranks_change_together_between_tokens(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_with_extensions(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = run_ranks("background", 2)
    assert code == 0, err
    assert out.count("done") == 2
    assert err.count("rank 1: extend stays uncompiled: the compiling process was killed") == 1
    assert "rank 0: extend" not in err
    assert not list((tmp_path / "yoke" / "steps").glob("*.partial-*"))

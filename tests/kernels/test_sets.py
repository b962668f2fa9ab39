"""What the tests of kernels are run with."""

from __future__ import annotations

from comm.sources import read_level
from tests.kernels.sets import KNOWN, SETS


def test_every_set_of_this_processor_is_run() -> None:
    """None is skipped but for what the processor lacks; for matrix units the kernel must agree, too."""
    has = list(KNOWN[: read_level() + 1])
    assert [name for name in SETS if name != "amx"] == [name for name in has if name != "amx"]
    assert set(SETS) <= set(has)

"""The entry point `python -m tp.reshard`; the work is done in `reshard`."""

from __future__ import annotations

import sys
from os.path import dirname, realpath

if __name__ == "__main__":  # sys.path[0] is this folder (with -m, the current one): use the checkout
    checkout = dirname(dirname(realpath(__file__)))
    sys.path[:] = [checkout, *sys.path[not getattr(sys.flags, "safe_path", False) :]]
    from base.venv import continue_in_venv

    continue_in_venv(checkout)

from base.streams import running
from reshard.command import main

if __name__ == "__main__":
    sys.exit(running(lambda: main(sys.argv[1:])))

"""`python -m quantize`: the same as `python launch.py quantize`."""

from __future__ import annotations

import sys
from os.path import dirname, realpath

if __name__ == "__main__":  # put the checkout first on sys.path, not this or the current folder
    checkout = dirname(dirname(realpath(__file__)))
    sys.path[:] = [checkout, *sys.path[not getattr(sys.flags, "safe_path", False) :]]
    from base.venv import continue_in_venv

    continue_in_venv(checkout)

from base.streams import running
from quantize.command import main

if __name__ == "__main__":
    sys.exit(running(lambda: main(sys.argv[1:])))

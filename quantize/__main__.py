"""`python -m quantize`: the same as `python launch.py quantize`."""

from __future__ import annotations

import sys

from base.streams import running
from quantize.command import main

if __name__ == "__main__":
    sys.exit(running(lambda: main(sys.argv[1:])))

"""`python -m quantize`: the same as `python launch.py quantize`."""

from __future__ import annotations

import sys

from quantize.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

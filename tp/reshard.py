"""`python -m tp.reshard`: the door to `reshard`, where the work is done."""

from __future__ import annotations

import sys
from os.path import dirname, realpath

if __name__ == "__main__":  # the checkout in place of this or, with -m, of the current folder
    checkout = dirname(dirname(realpath(__file__)))
    sys.path[:] = [checkout, *sys.path[not sys.flags.safe_path :]]

from base.streams import running
from reshard.command import main

if __name__ == "__main__":
    sys.exit(running(lambda: main(sys.argv[1:])))

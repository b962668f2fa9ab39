"""The script that starts a rank: `python launcher/entry.py FD`.

It is run by path, not with -m, so the user's PYTHONPATH need not change, and nothing is imported from
the current folder.
"""

import sys
from os.path import dirname, realpath

if __name__ == "__main__":
    checkout = dirname(dirname(realpath(__file__)))
    # Replace this folder (absent with -P): its files could be imported as top-level modules.
    sys.path[:] = [checkout, *sys.path[not sys.flags.safe_path :]]
    from launcher.child import main

    sys.exit(main(int(sys.argv[1])))

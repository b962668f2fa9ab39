"""The first lines of a rank, started by path: `python launcher/entry.py FD`.

Not as a module, so that nothing of the user's PYTHONPATH needs to change for it, and nothing of the
folder that the command was given in is imported.
"""

import sys
from os.path import dirname, realpath

if __name__ == "__main__":
    checkout = dirname(dirname(realpath(__file__)))
    # In place of this folder (absent with -P), whose files would pass for modules of their own.
    sys.path[:] = [checkout, *sys.path[not sys.flags.safe_path :]]
    from launcher.child import main

    sys.exit(main(int(sys.argv[1])))

"""The first lines of a rank, started by path: `python launcher/rank.py FD`.

Not as a module, so that nothing of the user's PYTHONPATH needs to change for it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose files would pass for modules of their own.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launcher.child import main

    sys.exit(main(int(sys.argv[1])))

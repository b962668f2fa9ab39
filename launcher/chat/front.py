"""The script that starts the chat's process: `python -I -S launcher/chat/front.py FD PID`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    from launcher.chat.conversation import main

    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))

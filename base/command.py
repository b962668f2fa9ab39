"""What a user types to call Yoke, for help texts and hints."""

from __future__ import annotations

import os


def typed(text: str) -> str:
    """The text with `python launch.py` and `python -m tp.reshard` replaced by what this user typed: the
    script `yoke`, which works in any folder, sets YOKE_NAME."""
    name = os.environ.get("YOKE_NAME", "")
    if not name:
        return text
    return text.replace("python launch.py", name).replace("python -m tp.reshard", f"{name} reshard")

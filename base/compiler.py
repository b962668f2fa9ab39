"""Find the C++ compiler that the user wants, as the words of its command.

`$CXX` may hold more than a program: `ccache g++`, `g++ -march=x86-64-v3`. Only this module reads it.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The words of `$CXX`, split by a shell's rules, else g++ or c++ from the path; None if there is
    neither. It does not check that the compiler runs. Raises ValueError if a quote is not closed."""
    named = environ.get("CXX", "").strip()
    search = environ.get("PATH")
    if named:
        # The path of one program may contain a space without quotes.
        return [named] if shutil.which(named, path=search) else shlex.split(named)
    found = shutil.which("g++", path=search) or shutil.which("c++", path=search)
    return None if found is None else [found]


def program_of(words: list[str]) -> str:
    """The word of a compiler command that names the compiler: not a wrapper before it (`ccache`), nor
    its flags."""
    programs = []
    for word in words:
        if word.startswith("-"):
            break
        programs.append(word)
    return programs[-1] if programs else words[0]

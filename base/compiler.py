"""Which C++ compiler this user wants, as the words that call it.

`$CXX` may hold more than a program: `ccache g++`, `g++ -march=x86-64-v3`. It is read here alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The words of `$CXX`, by a shell's rules, else g++ or c++ from the path; None if there is neither.
    Whether it runs is for the caller to find out. Raises ValueError where a quote is not closed."""
    named = environ.get("CXX", "").strip()
    search = environ.get("PATH")
    if named:
        # A program whose path has a space in it needs no quotes.
        return [named] if shutil.which(named, path=search) else shlex.split(named)
    found = shutil.which("g++", path=search) or shutil.which("c++", path=search)
    return None if found is None else [found]


def program_of(words: list[str]) -> str:
    """Of the words that call a compiler the one that names it: not what it is called through
    (`ccache`), nor its flags."""
    programs = []
    for word in words:
        if word.startswith("-"):
            break
        programs.append(word)
    return programs[-1] if programs else words[0]

"""A target that runs the user's program, as `python script.py args` or `python -m module` would.

The program runs in this process, after binding, so it has the binding, the heartbeat and the error
reports of any rank. It sees the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and none of Yoke's modules. Its sys.path is what python
would give it: the script's folder first or, for a module, the current folder; neither with `python -P`.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from base.errors import LaunchError
from base.rank_settings import RankSettings

CHECKOUT = str(Path(__file__).resolve().parent.parent)
_LOADED = ("base", "launcher", "launch", "engine")  # Yoke's packages loaded before the program


def check_program(words: list[str]) -> str:
    """The payload for `main`, from `script.py args...` or `-m module args...`. Raises LaunchError."""
    module = bool(words) and words[0] == "-m"
    rest = words[1:] if module else words
    if not rest:
        raise LaunchError("run needs a program: run [flags] script.py args... (or -m module args...)")
    if not module and not Path(rest[0]).is_file():
        raise LaunchError(f"{rest[0]} is not a file; run takes script.py args... or -m module args...")
    if module and not _is_known(rest[0].partition(".")[0]):
        raise LaunchError(_no_module(rest[0]))
    return json.dumps({"module": module, "name": rest[0], "argv": rest[1:]})


def _is_known(top: str) -> bool:
    """Whether a program could import a module or package of this name, which has no dots. Nothing is
    imported: a package's own code would run in the launcher."""
    path = [entry for entry in sys.path if entry != CHECKOUT]
    path[:0] = [] if sys.flags.safe_path else [os.getcwd()]
    for finder in sys.meta_path:
        where = path if finder is PathFinder else None
        if finder.find_spec(top, where) is not None:
            return True
    return False


def _no_module(name: str) -> str:
    return (
        f"-m {name}: {sys.executable} finds no module of this name, nor a package with __main__.py; is "
        "it installed there, or in the current folder?"
    )


def _check_module(name: str) -> None:
    """Raise LaunchError if there is no such module to run. The packages that it is in are imported."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # one that a package needs is missing
        spec = None
    if spec is None:
        raise LaunchError(_no_module(name))


def main(env: RankSettings, payload: str) -> int:
    """Run the program to its end and return its exit code."""
    program = json.loads(payload)
    if env.store_fd is not None:
        # The program binds the master port itself. Until now this socket kept it from other processes.
        socket.socket(fileno=env.store_fd).close()
    name, argv = program["name"], program["argv"]
    # The program must import its own `models` or `comm`, not Yoke's.
    sys.path[:] = [entry for entry in sys.path if entry != CHECKOUT]
    for loaded in [module for module in sys.modules if module.split(".")[0] in _LOADED]:
        if Path(CHECKOUT) in Path(getattr(sys.modules[loaded], "__file__", None) or "/").parents:
            del sys.modules[loaded]
    try:
        if program["module"]:
            _prepend_path(os.getcwd())
            sys.argv = [name, *argv]
            _check_module(name)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            path = str(Path(name).resolve())
            _prepend_path(str(Path(path).parent))
            sys.argv = [name, *argv]
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        return _exit_code(end.code)
    return 0


def _prepend_path(folder: str) -> None:
    """Put `folder` first on sys.path, unless the user turned that off (-P, PYTHONSAFEPATH)."""
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def _exit_code(code: object) -> int:
    """The exit code of a SystemExit, by python's rules: None is 0; a text is printed and is 1."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1

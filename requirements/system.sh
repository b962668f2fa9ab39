#!/bin/sh
# Check that the system has what Yoke needs, before anything is installed. Usage: system.sh PYTHON
python=$1
missing=
need() { # need WHAT PACKAGE: report WHAT as missing, and remember PACKAGE
    echo "missing: $1 (Debian package: $2)" >&2
    missing="$missing $2"
}
if command -v "$python" >/dev/null 2>&1; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        need "Python 3.11 or newer ($python is $("$python" -V 2>&1))" python3
    "$python" -c 'import venv, ensurepip' 2>/dev/null || need "Python's venv module" python3-venv
    # torch.compile builds C++ against Python's own headers.
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        need "Python's C headers" python3-dev
else
    need "$python" python3
fi
# CXX may be several words (ccache g++), or the path of one program with a space in it.
command -v "${CXX:-g++}" >/dev/null 2>&1 || ${CXX:-g++} --version >/dev/null 2>&1 ||
    need "a C++ compiler (${CXX:-g++})" g++
command -v make >/dev/null 2>&1 || need make make
if [ -n "$missing" ]; then
    echo "to install them: apt-get install$missing" >&2
    exit 2
fi

"""The process in which chat templates run: it reads requests from standard input and writes answers to
standard output, one JSON object a line. The parent is models/chat.py.

A template is a program from a file that may not be trusted. jinja2's sandbox keeps it away from the
rest of Python. The operating system limits its time and memory, because no check here could bound what
strings, lists and filters do inside one expression: each request has a limit of processor time, after
which the kernel ends this process, and a limit of address space, beyond which allocations fail. Large
powers and repetitions are refused before they run: they are short to write and slow to fail.

What is not here: anything but the standard library and jinja2, so that it starts in a tenth of a
second.

Source: `utils/chat_template_utils.py` of transformers, whose behavior this follows.
"""

from __future__ import annotations

import functools
import json
import operator
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_BITS = 1 << 12  # bits of a power or a product of integers, at most
_ITEMS = 1 << 24  # items of a repeated string or list, at most
_MEMORY = 150 << 20  # bytes of address space for a template
_PER_BYTE = 16  # further bytes of address space for each byte of the request


def main() -> None:
    """Answer requests until standard input closes. `seconds` of a request is its processor time,
    `length` the maximum number of characters of the text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    own = pages * resource.getpagesize()
    for line in sys.stdin.buffer:
        limit = own + _MEMORY + _PER_BYTE * len(line)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        sys.stdout.buffer.write(_answer(line))
        sys.stdout.buffer.flush()


def _answer(line: bytes) -> bytes:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        text = _render(_compile(request["template"]), request["variables"], request["length"])
        return json.dumps({"text": text}).encode() + b"\n"
    # A template may raise any exception: it can divide, index and nest without limits.
    except MemoryError:
        reason = "it needs too much memory"
    except Exception as error:
        reason = _shown(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return json.dumps({"error": reason[:1000]}).encode() + b"\n"


def _shown(error: Exception) -> str:
    try:
        return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    except Exception:  # the error itself may fail to convert to a string
        return type(error).__name__


def _render(template: Template, variables: Mapping[str, Any], most: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise TemplateError(f"it writes more than {most} characters")
    return "".join(pieces)


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Template:
    environment = _environment()
    for reference in environment.parse(source).find_all(nodes.NSRef):
        _check_name(reference.attr)
    return environment.from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.intercepted_binops = frozenset(("*", "**"))
    environment.binop_table |= {"*": _times, "**": _power}
    # jinja2's own tojson escapes for HTML.
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _namespace
    return environment


def _times(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for items, count in ((left, right), (right, left)):
        repeated = isinstance(items, str | list | tuple) and isinstance(count, int)
        if repeated and len(items) * count > _ITEMS:
            raise TemplateError(f"it repeats {len(items)} items {count} times")
    return operator.mul(left, right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)
    return operator.pow(left, right)


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise TemplateError(f"it computes a number of more than {_BITS} bits")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(reason: str) -> None:
    raise TemplateError(reason)


def _namespace(*args: Any, **attributes: Any) -> Namespace:
    for name in dict(*args, **attributes):
        _check_name(str(name))
    return Namespace(*args, **attributes)


def _check_name(name: str) -> None:
    """Refuse names that begin with an underscore in a namespace: they could shadow Python's own."""
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks the assistant's text for training. The
    content is rendered in its own scope. (jinja2 accepts extensions only as classes.)"""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)

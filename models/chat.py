"""Chat templates: they turn a conversation into the text that a model was trained to continue.

A template is a program from a file that may not be trusted. Templates therefore run in a separate
process (models/chat_child.py), which starts with the first template and ends with this process. A
template may use `_SECONDS` of processor time, `_WAIT_S` of wall time, limited memory, and write
`_LENGTH` characters. Every failure of a template, or of its process, is an InputError here.

What is not here: `continue_final_message`; marking the assistant's tokens; message parts other than
text, unless the template itself handles them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import InputError

if TYPE_CHECKING:
    from models.tokenizer.codec import TextCodec

_SECONDS = 1.5
_WAIT_S = 60.0
_LENGTH = 1 << 25  # characters
# The child skips site-packages' start-up files and the current folder, and uses this process's path.
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from models.chat_child import main; main()"


def apply_chat_template(
    codec: TextCodec,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    name: str | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation. With `add_generation_prompt` it ends where the model's answer begins.

    Messages have "role" and "content", oldest first; keys whose value is None are left out. `tools`
    are JSON schemas. `name` picks one of several templates; the default is "tool_use" if there are
    tools and such a template, else "default". Other `variables` (`enable_thinking=False`) go to the
    template. All values must be JSON values. Encode the text with `whole=False`: the template writes
    the first token itself. Raises InputError if there is no template or no message, or if the template
    fails.
    """
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    template = _pick(codec.chat_templates, name, tools is not None)
    given = {
        **codec.special,
        "messages": [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ],
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "documents": None if documents is None else [dict(entry) for entry in documents],
        "add_generation_prompt": add_generation_prompt,
        **variables,
    }
    request = {"template": template, "variables": given, "seconds": _SECONDS, "length": _LENGTH}
    answer = _ask(json.dumps(request).encode() + b"\n")
    if "text" not in answer:
        raise InputError(f"the model's chat template cannot be used: {answer['error']}")
    text: str = answer["text"]
    return text


def _pick(templates: Mapping[str, str | InputError], name: str | None, has_tools: bool) -> str:
    if not templates:
        raise InputError("chat=true: this model has no chat template; leave chat=false")
    if name is None:
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
    if name not in templates:
        raise InputError(
            f"this model has no chat template {name!r}; it has {', '.join(sorted(templates))}"
        )
    found = templates[name]
    if isinstance(found, InputError):
        raise found
    return found


def start_templates() -> None:
    """Start the process that runs templates, so that it is ready for the first one."""
    _child()


@functools.cache
def _child() -> subprocess.Popen[bytes]:
    """The process that runs templates. It ends when this process closes its standard input."""
    checkout = str(Path(__file__).resolve().parent.parent)
    path = [checkout, *(entry for entry in sys.path if os.path.isabs(entry))]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, *path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _end(child: subprocess.Popen[bytes]) -> int:
    """Kill the process if it still runs. Returns its exit code."""
    child.kill()
    for stream in (child.stdin, child.stdout):
        with suppress(OSError):
            if stream is not None:
                stream.close()
    return child.wait()


@atexit.register
def _end_any() -> None:
    if _child.cache_info().currsize:
        _end(_child())


def _ask(request: bytes) -> dict[str, Any]:
    """The answer of the process, or {"error": ...} if it ended or ran out of time."""
    child = _child()
    line = _exchange(child, request, time.monotonic() + _WAIT_S)
    if line is not None and line.endswith(b"\n"):
        answer: dict[str, Any] = json.loads(line)
        return answer
    if line is not None:
        child.wait()  # its output is closed: it has ended, or is about to
    _child.cache_clear()  # the next template gets a new process
    code = _end(child)
    if line is None:
        return {"error": f"it is not done after {_WAIT_S:g} s"}
    if code == -signal.SIGPROF:
        return {"error": f"it takes longer than {_SECONDS:g} s"}
    return {"error": f"its process ended with code {code}"}


def _exchange(child: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes | None:
    """Send one line and read one line back: part of a line if the process ends, None after the
    deadline."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(request)
        child.stdin.flush()
    except BrokenPipeError:
        return b""
    chunks: list[bytes] = []
    while not (chunks and chunks[-1].endswith(b"\n")):
        left = max(0.0, deadline - time.monotonic())
        if not select.select([child.stdout], [], [], left)[0]:
            return None
        chunk = os.read(child.stdout.fileno(), 1 << 20)
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks)

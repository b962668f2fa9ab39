"""Chat templates: a conversation as the text that a model was trained to continue.

Templates are programs from a file that may not be trusted. They run in jinja2's sandbox, in the
environment that transformers gives them, for `_SECONDS` at most and for an output of `_LENGTH` at
most; a loop without end is stopped wherever it is. What is not prevented: a single expression that
asks for much memory (`'x'.center(10**10)`); where that fails, it is an InputError like all else.

What is not here: `continue_final_message`, marking what the assistant said, and messages with parts
other than text that a template does not itself know.

Source: `utils/chat_template_utils.py` of transformers, whose behaviour this follows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from models.tokenizer import TextCodec
from weights.errors import InputError

_SECONDS = 10.0
_LENGTH = 1 << 25  # characters
_FRAME = "<template>"  # the file name that jinja2 gives to the code of templates


def apply_chat_template(
    codec: TextCodec,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    name: str | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation, ready for the model's answer if `add_generation_prompt`.

    A message has "role" and "content", oldest first; keys whose value is None are left out. `tools`
    are JSON schemas. `name` picks one of several templates; without it, "tool_use" is taken where
    there are tools, and else "default". Further `variables` (`enable_thinking=False`) are the
    template's own. Encode the text with `whole=False`: the template writes the first token itself.
    Raises InputError when there is no template or no message, or where the template fails.
    """
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    template = _pick(codec.chat_templates, name, tools is not None)
    try:
        return _render(
            _compile(template),
            {
                **codec.special,
                "messages": [
                    {key: value for key, value in message.items() if value is not None}
                    for message in messages
                ],
                "tools": None if tools is None else [dict(tool) for tool in tools],
                "documents": None if documents is None else [dict(entry) for entry in documents],
                "add_generation_prompt": add_generation_prompt,
                **variables,
            },
        )
    # A template may raise whatever Python does: it divides, indexes, and nests as it likes.
    except Exception as error:
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise InputError(f"the model's chat template cannot be used: {reason[:1000]}") from error


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


def _render(template: Template, variables: Mapping[str, Any]) -> str:
    pieces, length = [], 0
    with _deadline(time.monotonic() + _SECONDS):
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > _LENGTH:
                raise TemplateError(f"it writes more than {_LENGTH} characters")
    return "".join(pieces)


@contextmanager
def _deadline(deadline: float) -> Iterator[None]:
    """Stop templates in this thread at the deadline. Python calls the trace function for each line of
    a template's code, also in a loop that writes nothing; other code is not traced."""

    def line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if time.monotonic() > deadline:
            raise TemplateError(f"it takes longer than {_SECONDS:.0f} s")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return line if frame.f_code.co_filename == _FRAME else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _compile(source: str) -> Template:
    environment = _environment()
    for reference in environment.parse(source).find_all(nodes.NSRef):
        _check_name(reference.attr)
    return environment.from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    # Not jinja2's own tojson, which escapes for HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _namespace
    return environment


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
    """Namespaces hold no names that begin with an underscore: they could shadow Python's own."""
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, with which training marks what the assistant said:
    what is inside is rendered, in a scope of its own. (jinja2 takes extensions as classes only.)"""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)

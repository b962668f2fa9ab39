"""Conversations as text against transformers, and templates that mean harm."""

# ruff: noqa: E501
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, models

from base.errors import InputError
from models import chat
from models.chat import apply_chat_template
from models.tokenizer.codec import TextCodec
from tests.models.hostile_texts import TEMPLATES as HOSTILE

CHECKOUT = Path(__file__).resolve().parent.parent.parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# In the structure of the templates that the families ship.
TEMPLATES = {
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must take turns') }}{% endif %}
{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama 3": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}{{- message.tool_calls[0].function.arguments | tojson }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}{%- set ns.multi_step_tool = false %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- if loop.index0 == ns.last %}{{- '' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "mistral": """{%- set loop_messages = messages | selectattr("role", "ne", "system") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "tool" %}{%- continue %}{%- endif %}
    {%- if message["role"] == "user" %}{{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}{%- generation %}{{- " " + message["content"]|trim + eos_token }}{%- endgeneration %}
    {%- else %}{%- break %}{%- endif %}
{%- endfor %}
""",
    "phi": """{% for message in messages %}
    {% if message['role'] == 'system' %}
        {{ '<|system|>\n' + message['content'] + '<|end|>\n' }}
    {% elif (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n'}}
    {% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n'}}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% else %}{{ eos_token }}{% endif %}{{ pad_token }}{{ unk_token }}{{ sep_token }}""",
    "scopes": """{% set x = 0 %}{% for m in messages %}{% generation %}{% set x = loop.index %}{{ x }}{% endgeneration %}
{{ x }}{% endfor %}{% generation %}{% set y = 2 %}{{ x + y }}{% endgeneration %}[{{ x }}{{ y }}]Hello {{ '{{ 1 }}' }}""",
    "filters": """{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}
{{ '<b>&"' }}{{ messages | map(attribute='role') | join(',') }} {{ dict(a=1) }} {{ range(3) | list }}
{{ documents is none }} {{ tools is none }} {{ missing }} {{ messages[0].missing }} {{ 7 // 2 }} {{ loop is defined }}
{% macro turn(m) -%} <{{ m.role }}> {%- endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}
    {# gone #}
  {% set x %}a{% for m in messages %}{{ loop.last }}{% endfor %}{% endset %}{{ x | upper }}
""",
}  # fmt: skip

USER, ASSISTANT, SYSTEM = (
    {"role": "user", "content": "  Hello {{ 1 }} <b>é👍</b>\n "},
    {"role": "assistant", "content": "<think>hm</think>\nHi </s>\t"},
    {"role": "system", "content": "Be\nkind"},
)
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "turns": [USER, ASSISTANT, USER],
    "answered": [USER, ASSISTANT],
    "system": [SYSTEM, USER],
    "system and turns": [SYSTEM, USER, ASSISTANT, {**USER, "name": None, "tool_calls": None}],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "é <x>", "parameters": {"b": 1, "a": []}},
    }
]


def codec(template: Any, special: dict[str, str] | None = None) -> TextCodec:
    templates = {"default": template} if isinstance(template, str) else template
    return TextCodec(
        lambda text, whole: [], lambda tokens: "", lambda: str, frozenset(), templates, special or {}
    )


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words()), **SPECIAL)


def words() -> models.Model:
    return models.WordLevel({token: i for i, token in enumerate(SPECIAL.values())}, "<unk>")


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_conversation_is_rendered_as_transformers_renders_it(
    family: str, talk: str, reference: Any
) -> None:
    template = TEMPLATES[family]
    for variables in (
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS, "documents": [{"title": "t", "text": "x"}]},
        {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "[B]"},
    ):
        wanted = error = None
        try:
            wanted = reference.apply_chat_template(
                TALKS[talk],
                tokenize=False,
                chat_template=template,
                **{"add_generation_prompt": True, **variables},
            )
        except Exception as raised:
            error = str(raised)
        if error is None:
            assert apply_chat_template(codec(template, SPECIAL), TALKS[talk], **variables) == wanted
        else:
            with pytest.raises(InputError) as refused:
                apply_chat_template(codec(template, SPECIAL), TALKS[talk], **variables)
            assert str(refused.value).endswith(error)


def test_the_families_templates_say_something(reference: Any) -> None:
    for template in TEMPLATES.values():
        text = apply_chat_template(codec(template, SPECIAL), TALKS["turns"])
        assert "Hello {{ 1 }}" in text or template is TEMPLATES["filters"]


def test_templates_are_picked_by_name() -> None:
    several = codec({"default": "a", "tool_use": "b", "rag": "c"})
    assert apply_chat_template(several, [USER]) == "a"
    assert apply_chat_template(several, [USER], tools=TOOLS) == "b"
    assert apply_chat_template(several, [USER], tools=TOOLS, name="rag") == "c"
    assert apply_chat_template(codec("a"), [USER], tools=TOOLS) == "a"
    with pytest.raises(InputError, match="no chat template 'x'; it has default, rag, tool_use"):
        apply_chat_template(several, [USER], name="x")
    with pytest.raises(InputError, match="no chat template 'default'; it has rag"):
        apply_chat_template(codec({"rag": "c"}), [USER])
    with pytest.raises(InputError, match="has no chat template; leave chat=false"):
        apply_chat_template(codec({}), [USER])
    with pytest.raises(InputError, match="conversation is empty"):
        apply_chat_template(several, [])


REFUSED = {
    "unsafe": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "unsafe ": "{{ raise_exception.__globals__.sys }}",
    "cannot hold '__x__'": "{% set ns = namespace() %}{% set ns.__x__ = 1 %}",
    "cannot hold '_y'": "{% set ns = namespace(_y=1) %}",
    "not safely callable|unsafe": "{{ messages.append(1) }}",
    "roles must alternate": "{{ raise_exception('roles must alternate') }}",
    "unexpected 'end of template'|cannot be used": "{% for",
    "unknown tag": "{% import_everything %}",
    "no loader|cannot be used": "{% include '/etc/passwd' %}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "TypeError": "{{ messages + 1 }}",
    "IndexError|has no element": "{{ messages[99].x }}",
    "has no attribute": "{{ messages[0].nothing.more }}",
    "RecursionError": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "RecursionError ": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "Range too big": "{{ range(10 ** 9) | list }}",
    "it repeats 1 items": "{{ 'x' * 10 ** 15 }}",
    "too much memory": "{{ 'x'.center(10 ** 10) }}",
    "'lipsum' is undefined": "{{ lipsum() }}",
    "more than 4096 bits": "{{ 9 ** (9 ** 9) }}",
}


@pytest.mark.parametrize("match", REFUSED)
def test_a_template_that_fails_or_means_harm_is_one_message(match: str) -> None:
    with pytest.raises(InputError, match=match.strip()) as refused:
        apply_chat_template(codec(REFUSED[match]), [USER])
    assert "chat template cannot be used" in str(refused.value)


@pytest.mark.parametrize(
    "body",
    ["", "{% set x = a %}", "{% set x %}{{ b }}{% endset %}", "{% if false %}{% endif %}"],
)
def test_a_loop_without_end_is_stopped(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}" + body + "{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="takes longer than"):
        apply_chat_template(codec(loop), [USER])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_has_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of time and memory, whatever it does; and the next conversation is rendered as ever."""
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    with pytest.raises(InputError, match="chat template cannot be used"):
        apply_chat_template(codec(HOSTILE[name]), [USER])
    status = Path(f"/proc/{chat._child().pid}/status").read_text()
    assert int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) < 200 << 10
    assert apply_chat_template(codec("{{ messages[0].role }}"), [USER]) == "user"


def test_the_process_of_templates_ends_with_this_one() -> None:
    """However this one ends; it sees no module of the current folder."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from models import chat\n"
        'print(chat._child().pid, chat._ask(b\'{"template": "x", "variables": {}, \'\n'
        'b\'"seconds": 1, "length": 9}\\n\'), flush=True); os.kill(os.getpid(), 9)'
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jinja2.py").write_text("raise SystemExit('of the current folder')")
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(CHECKOUT)],
            cwd=folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    pid, _, answer = done.stdout.partition(" ")
    assert answer == "{'text': 'x'}\n", done.stderr
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_LENGTH", 1000)
    with pytest.raises(InputError, match="writes more than 1000 characters"):
        apply_chat_template(codec("{% for a in range(99999) %}{{ a }}{% endfor %}"), [USER])


def test_messages_are_not_changed_by_a_template() -> None:
    talk = [{"role": "user", "content": "x", "extra": None}]
    apply_chat_template(codec("{% set messages = [] %}{{ messages }}"), talk)
    assert apply_chat_template(codec("{{ messages[0] }}"), talk) == "{'role': 'user', 'content': 'x'}"
    assert talk == [{"role": "user", "content": "x", "extra": None}]

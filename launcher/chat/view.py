"""What a chat shows besides the answers: timings, facts, the list of commands. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Container, Mapping, Sequence
from typing import Any

from launcher.chat.link import Done

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation, keep the system message",
    "/system TEXT": 'set the system message and reset; "" removes it; without TEXT: show it',
    "/set KEY=VALUE ...": "change temperature=, seed=, stop=, ...; without KEY: show them all",
    "/save FILE": "write the conversation to a file, as JSON",
    "/load FILE": "go on with the conversation in a file",
    "/stats": "tokens, times, rates",
    "/quit": "end the chat, as Ctrl-D does",
}

_KEYS = """\
A line that ends with \\ continues in the next; \"\"\" begins and ends a text of several lines; a line
that begins with a space is not a command. Ctrl-C stops an answer, or clears the prompt; twice at an
empty prompt, it ends the chat. Arrow up recalls earlier messages."""


def help_text() -> str:
    lines = [f"  {name:<20}{text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, _KEYS])


def unknown(word: str) -> str:
    names = "  ".join(name.split()[0] for name in COMMANDS)
    return f"no command {word}; there are: {names}"


def greeting(facts: Mapping[str, Any]) -> str:
    """Two lines: the model, its maximum sequence length and whatever else rank 0 reports; help. A third
    says that a model only continues texts."""
    others = [
        str(value) if isinstance(value, str) else f"{key} {value}"
        for key, value in facts.items()
        if key not in ("model", "max_seq_len", "continues")
    ]
    parts = [str(facts["model"]), f"room for {facts['max_seq_len']} tokens", *others]
    lines = [" | ".join(parts), "/help lists the commands, Ctrl-D ends"]
    if facts.get("continues"):
        lines.append("this model has no chat template: it continues each text that is typed")
    return "\n".join(lines)


def figures(done: Done) -> str:
    """The line under an answer."""
    parts = [f"{done.tokens} tokens", f"TTFT {done.ttft_s * 1e3:.0f} ms", _rate(done.tpot_s)]
    if done.cached_tokens:
        parts.insert(1, f"{done.cached_tokens} of {done.prompt_tokens} prompt tokens cached")
    if done.finish == "cancelled":
        parts.insert(0, "stopped")
    elif done.finish == "length":
        parts.insert(0, "cut at max_new_tokens or max_seq_len")
    return f"[{' | '.join(parts)}]"


def settings(values: Mapping[str, Any], changed: Container[str]) -> str:
    """The settings that were changed, or all of them if none was, as they are typed."""
    shown = {key: value for key, value in values.items() if key in changed} or values
    return "  " + " ".join(f"{key}={shlex.quote(str(value))}" for key, value in shown.items())


def count_turns(turns: int) -> str:
    return "1 turn" if turns == 1 else f"{turns} turns"


def stats(answers: Sequence[Done], current: Done | None, turns: int, max_seq_len: int) -> str:
    """A small table. `answers` are all those of this session; `current` is the last one of the current
    conversation, which has `turns`, None if it was loaded and has none yet. `max_seq_len` is in
    tokens."""
    last = answers[-1] if answers else None
    used = "0" if current is None else str(current.prompt_tokens + current.tokens)
    if current is None and turns:
        used = "not counted yet,"
    rows = [
        ("turns", f"{turns} in this conversation, {len(answers)} in all"),
        ("conversation", f"{used} of {max_seq_len} tokens"),
    ]
    if last is not None:
        steps = [(done.tokens - 1, done.tpot_s) for done in answers if done.tokens > 1]
        spent_s = sum(count * tpot_s for count, tpot_s in steps)
        mean_s = spent_s / sum(count for count, _ in steps) if steps else 0.0
        ttft_s = sum(done.ttft_s for done in answers) / len(answers)
        prompts = sum(done.prompt_tokens for done in answers)
        cached = sum(done.cached_tokens for done in answers)
        rows += [
            ("TTFT", f"{last.ttft_s * 1e3:.0f} ms last, {ttft_s * 1e3:.0f} ms mean"),
            ("rate", f"{_rate(last.tpot_s)} last, {_rate(mean_s)} mean"),
            ("cached", f"{last.cached_tokens} of {last.prompt_tokens} prompt tokens last, "
             f"{cached} of {prompts} in all"),
        ]  # fmt: skip
    return "\n".join(f"  {name:<14}{text}" for name, text in rows)


def _rate(tpot_s: float) -> str:
    return f"{1 / tpot_s:.1f} tokens/s" if tpot_s > 0 else "no rate"

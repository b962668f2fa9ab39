"""Files of prompts: what they may say, and that a mistake is named with its line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from base.errors import InputError
from engine.job import Job
from engine.prompts import prompt_from_dict, read_prompts
from tests.jobs import job_of


def job(file: Path, *words: str) -> Job:
    return job_of(["model=tiny", f"prompts={file}", *words])


def test_a_prompt_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \nthrée\n")
    prompts = read_prompts(job(file, "seed=5", "max_new_tokens=7"))
    assert [prompt.text for prompt in prompts] == ["one", "  two ", "thrée"]
    assert {(prompt.max_new_tokens, prompt.sampling.seed) for prompt in prompts} == {(7, 5)}
    assert prompts[1].name == f"{file} line 3"
    assert prompts[0].messages == ()
    asked = read_prompts(job(file, "chat=true"))
    assert asked[0].messages == ({"role": "user", "content": "one"},)


def test_json_lines_have_settings_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "temperature": 1, "seed": 9, "max_new_tokens": 3, "id": ["x", 1]},
        {"messages": [{"role": "user", "content": "c"}], "logit_bias": {"5": -1.5}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    one, two, three = read_prompts(job(file, "temperature=0.5", "seed=4"))
    assert (one.sampling.temperature, one.sampling.seed, one.max_new_tokens) == (0.5, 4, 64)
    assert (two.sampling.temperature, two.sampling.seed, two.max_new_tokens) == (1, 9, 3)
    assert two.id == ["x", 1]
    assert three.messages == ({"role": "user", "content": "c"},)
    assert three.sampling.logit_bias == ((5, -1.5),)
    for prompt in (one, two, three):
        assert prompt_from_dict(json.loads(json.dumps(asdict(prompt)))) == prompt


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "a"', "line 2 is not JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ('{"promt": "a"}', "line 2: unknown key 'promt', did you mean 'prompt'"),
        ('{"prompt": "a", "messages": []}', "line 2 must have either prompt or messages"),
        ("{}", "line 2 must have either prompt or messages"),
        ('{"prompt": ""}', "prompt must be a non-empty string"),
        ('{"prompt": 5}', "prompt must be a non-empty string"),
        ('{"messages": []}', "messages must be a list of"),
        ('{"messages": [{"role": "user"}]}', "messages must be a list of"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens=0 must be a whole number, at least 1"),
        ('{"prompt": "a", "max_new_tokens": true}', "max_new_tokens=True must be"),
        ('{"prompt": "a", "temperature": "hot"}', "line 2: temperature='hot' must be a number"),
        ('{"prompt": "a", "top_k": 1.5}', "line 2: top_k=1.5 must be a whole number"),
        ('{"prompt": "a", "top_p": 2}', "line 2: top_p=2"),
        ('{"prompt": "a", "logprobs": 2}', "line 2: logprobs=2 is shown only with output=json"),
        ("plain text", "line 2 is not JSON"),
        ('{"prompt": "a", "logit_bias": 5}', "line 2: logit_bias must be like"),
        ("[" * 100000, "line 2 is not JSON"),
        (
            '{"prompt": "a", "prompt": "b"}',
            "line 2 is not JSON that can be used: the name 'prompt' occurs twi",
        ),
        ('{"prompt": "the \\ud83d cat"}', "line 2: prompt is not Unicode: '.ud83d' at position 4"),
        (
            '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            "content of message 1 is not Unicode",
        ),
        ('{"prompt": "a", "id": {"x": "\\ud83d"}}', "line 2: id is not Unicode"),
        (
            '{"prompt": "a", "id": ' + "[" * 500 + "]" * 500 + "}",
            "line 2: id is nested more than 32 deep",
        ),
        (
            '{"prompt": "a", "seed": ' + "1" * 5000 + "}",
            "line 2 is not JSON .* a number of 5000 digits",
        ),
        ('{"prompt": "a", "seed": ' + "1" * 30 + "}", "line 2: seed=1+ must be an integer from"),
        ('{"prompt": "a", "max_new_tokens": ' + "1" * 400 + "}", "line 2 .* a number of 400 digits"),
        ('{"prompt": "a", "logit_bias": {"5": ' + "1" * 400 + "}}", "line 2 .* a number of 400 digits"),
        ('{"prompt": "a", "logit_bias": {"' + "1" * 5000 + '": 1}}', "line 2: logit_bias must be like"),
        ('{"prompt": "a", "logit_bias": {"5": true}}', "line 2: logit_bias must be like"),
        ('{"prompt": "a", "logit_bias": [[1.7, 2]]}', "line 2: logit_bias must be like"),
        ('{"prompt": "a", "temperature": NaN}', "line 2: temperature=nan must be a number"),
        ('{"prompt": "a", "temperature": 1e999}', "line 2: temperature=inf must be a number"),
    ],
)
def test_a_mistake_is_named_with_its_line(line: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=match):
        read_prompts(job(file))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_prompts(job(tmp_path / "none.txt"))
    file = tmp_path / "bytes.txt"
    file.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"bytes.txt line 1 is not UTF-8 at byte 2 \(0xff\)"):
        read_prompts(job(file))
    file.write_text(" \n\n")
    with pytest.raises(InputError, match="has no prompt"):
        read_prompts(job(file))


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """Not at what else `splitlines` knows, nor at a lone carriage return; one before the end goes with
    it, and so does a byte-order mark before everything."""
    odd = "one\x0ctwo\u2028three\x85four\x0b\x1c\x1d\x1e\u2029five\rsix"
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeff{odd}\r\n\r\nseven\r\r\n{odd}".encode())
    prompts = read_prompts(job(file))
    assert [prompt.text for prompt in prompts] == [odd, "seven\r", odd]
    assert [prompt.name.rpartition(" ")[2] for prompt in prompts] == ["1", "3", "4"]
    file = tmp_path / "prompts.JSONL"
    line = json.dumps({"prompt": odd, "id": "\u2028"}, ensure_ascii=False)
    file.write_bytes(f"\ufeff{line}\r\n{line}\n".encode())
    assert [(prompt.text, prompt.id) for prompt in read_prompts(job(file))] == [(odd, "\u2028")] * 2


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (
            ["plain", '{"prompt": "a"}'],
            "line 2 begins like a JSON object, and the lines before it are plain",
        ),
        (["plain", "", ' {"promt": "a"'], "line 3 begins like a JSON object"),
        (['{"prompt": "a"}', "plain"], "line 2 is not JSON: Expecting value at character 1"),
    ],
)
def test_a_file_has_objects_or_plain_lines(lines: list[str], match: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=match):
        read_prompts(job(file))

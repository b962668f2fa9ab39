"""A job from the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence

from engine.job import Job, parse_job
from launcher.flags import parse_flags


def job_of(words: Sequence[str], need_prompt: bool = True) -> Job:
    return parse_job(parse_flags(words).given, need_prompt)

"""A model's compiled steps: `extend` runs any number of tokens, `decode` one token for every slot.

`extend` is compiled once, for a symbolic number of tokens: prompts need no padding, and a prompt of
another length compiles nothing. `decode` has one fixed shape. Where the model's code or the device
needs fixed shapes, prompts go in padded chunks.

Not here: when each step is run (`engine.loop`, `engine.beams`, `engine.speculation`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from comm.group import Group
from engine.chunks import CHUNK, PADDED_CHUNK, cache_length
from engine.requests import split_prompts
from kernels.load import has_kernels, last_error
from models.decoder import Decoder

if TYPE_CHECKING:  # transformers is imported for engine=hf only
    from models.hf.model import HfModel

AnyModel: TypeAlias = "Decoder | HfModel"
StepFunction = Callable[..., Tensor]
EXTEND, DECODE, GREEDY, BEAMS = "extend", "decode", "decode_greedy", "decode_beams"


@dataclass(frozen=True)
class Runner:
    """A model with a cache of `num_rows` slots of up to `max_seq_len` tokens, and its steps, compiled
    or not. R is `num_rows`, N the number of tokens, M of wanted logits, S is `cache_len`:

    extend(where int64 [3, N], wanted int64 [M]) -> float32 [M, vocab_size]: tokens, positions and slots
    decode(tokens int64 [R], positions int64 [R]) -> float32 [R, vocab_size]
    decode_greedy(tokens, positions) -> int64 [R]
    decode_beams(tokens, positions, sources int32 [R, S]) -> float32 [R, vocab_size]

    `chunk`: most tokens of one `extend` call; `padded`: every call has exactly that many. `mixed`: one
    call may hold tokens of several slots. `at_check`: what all ranks call when a loop synchronizes; it
    may replace steps.
    """

    group: Group
    device: torch.device
    num_rows: int
    max_seq_len: int
    cache_len: int
    vocab_size: int
    chunk: int
    padded: bool
    mixed: bool
    compiled: bool
    steps: dict[str, StepFunction]
    at_check: list[Callable[[], None]] = field(default_factory=list)

    def check(self) -> None:
        """Call what is to be called at a synchronization. Collective."""
        for call in self.at_check:
            call()


def make_runner(
    model: AnyModel,
    group: Group,
    max_seq_len: int,
    compiled: bool,
    num_rows: int = 1,
    kv_dtype: torch.dtype | None = None,
) -> Runner:
    """Allocate the cache and wrap the steps. Nothing is compiled yet.

    A model must have only one runner: a second one would replace its cache, and compiled steps have no
    guard that would notice.
    """
    own = isinstance(model, Decoder)
    cache_len = cache_length(max_seq_len, padded=not own)
    if isinstance(model, Decoder):
        model.setup(num_rows, cache_len, kv_dtype)
        vocab_size = model.config.vocab_size
    else:
        model.setup(num_rows, cache_len)
        vocab_size = model.vocab_size
    return Runner(
        group=group,
        device=next(model.parameters()).device,
        num_rows=num_rows,
        max_seq_len=max_seq_len,
        cache_len=cache_len,
        vocab_size=vocab_size,
        chunk=CHUNK if own else PADDED_CHUNK,
        padded=not own,
        mixed=own,
        compiled=compiled,
        steps=_steps(model, compiled, group),
    )


def _guards_of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are checked in every call: those on the step's arguments and on their
    symbolic sizes. Thousands of others are on the model, which does not change."""
    return [guard.guard_type == "SHAPE_ENV" or guard.name in _ARGUMENTS for guard in guards]


# Some torch versions name an argument by its place in the frame: L['tokens'].
_ARGUMENTS = {
    spelling.format(name)
    for name in ("where", "wanted", "tokens", "positions", "sources")
    for spelling in ("{}", "L['{}']")
}
# Inductor's asserts on the size and alignment of every weight and operator result are off, too: they
# would run in every call.
_UNGUARDED: dict[str, Any] = {
    "guard_filter_fn": _guards_of_arguments,
    "size_asserts": False,
    "alignment_asserts": False,
}
# Options that shorten every start, also one that finds all of its compiled code on disk.
# cpp_cache_precompile_headers=False: Inductor does not scan headers for a compiler that will not be
# called (precompiled headers do not make compiling faster here).
# cpp.vec_isa_ok=True, where our own kernels are loaded: Inductor does not start a Python process for
# each instruction set to test whether code that is compiled for it can be loaded.
_QUICK_START: dict[str, Any] = {"cpp_cache_precompile_headers": False}
_SETS_ARE_KNOWN: dict[str, Any] = {"cpp.vec_isa_ok": True}
# cpp_wrapper=True: C++ calls the operators, not Python. For a single token, operators take no longer
# than Python's calls (C++ saves 1 ms with SmolLM2). In a prompt, each operator evicts Python data from
# the CPU caches (C++ saves 1 %). cpp_wrapper_build_separate=True: the calls are compiled apart from the
# kernels, with little optimization, which halves the compile time.
_CALLED_IN_CPP: dict[str, Any] = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
# Older versions call an operator that takes a list through Python.
_CAN_CALL_IN_CPP = TorchVersion(torch.__version__) >= "2.13"


def _steps(model: AnyModel, compiled: bool, group: Group) -> dict[str, StepFunction]:
    # A function for each step, because the compiler keeps its results by function.
    def extend(where: Tensor, wanted: Tensor) -> Tensor:
        return model.extend(where[0], where[1], where[2], wanted)

    def decode(tokens: Tensor, positions: Tensor) -> Tensor:
        return model.decode(tokens, positions)

    def decode_greedy(tokens: Tensor, positions: Tensor) -> Tensor:
        return model.decode_greedy(tokens, positions)

    def decode_beams(tokens: Tensor, positions: Tensor, sources: Tensor) -> Tensor:
        assert isinstance(model, Decoder)
        return model.decode(tokens, positions, sources)

    steps: dict[str, StepFunction] = {
        EXTEND: extend, DECODE: decode, GREEDY: decode_greedy, BEAMS: decode_beams,
    }  # fmt: skip
    if not compiled:
        return steps
    own, on_gpu = isinstance(model, Decoder), next(model.parameters()).is_cuda
    # With other backends, collectives take so long that the time of the calls does not matter.
    own_ops = own and has_kernels() and (group.size == 1 or group.backend == "shm")
    in_cpp = own_ops and _CAN_CALL_IN_CPP
    return {name: _compiled(name, step, own, on_gpu, in_cpp) for name, step in steps.items()}


def _compiled(name: str, step: StepFunction, own: bool, on_gpu: bool, in_cpp: bool) -> StepFunction:
    """`own`: the model is a Decoder, whose code depends on nothing that changes after `setup`."""
    assert isinstance(step, FunctionType)
    # Dynamo looks compiled code up by code object, which all runners would share. Each runner gets a
    # copy, because the remaining guards cannot distinguish the models of two runners.
    step = FunctionType(step.__code__.replace(), step.__globals__, name, None, step.__closure__)
    if name == EXTEND or not on_gpu:
        dynamic = None if name == EXTEND else False
        known = not on_gpu and has_kernels()
        options = _QUICK_START | (_UNGUARDED if own else {}) | (_SETS_ARE_KNOWN if known else {})
        if in_cpp:
            options |= _CALLED_IN_CPP
        quick = torch.compile(step, fullgraph=True, dynamic=dynamic, options=options)
        return with_reason(quick) if in_cpp else quick
    # One CUDA graph, collectives included: launching each kernel would take longer than the kernels.
    recorded = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def replay(*inputs: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's results have been read
        result: Tensor = recorded(*inputs)
        return result

    return replay


def with_reason(step: StepFunction) -> StepFunction:
    """Wrap a step so that its errors give the reason: the generated C++ says only which call failed."""

    def call(*inputs: Tensor) -> Tensor:
        try:
            return step(*inputs)
        except RuntimeError as error:
            reason = last_error() if "API call failed" in str(error) else ""
            if not reason:
                raise
            raise RuntimeError(reason) from None

    return call


@torch.no_grad()
def extend(
    runner: Runner,
    tokens: Sequence[int],
    positions: Sequence[int],
    rows: Sequence[int],
    wanted: Sequence[int],
) -> Tensor:
    """Run 1 to `runner.chunk` tokens; returns the logits after the tokens at the indices `wanted`
    (which may be empty): float32 [len(wanted), vocab_size]."""
    where = [list(tokens), list(positions), list(rows)]
    # Padding repeats the last token. It has the same position, so the cache does not change. In
    # padded chunks it has the next positions, and is overwritten before anything attends to it. A call
    # has at least two tokens: one token would need another graph.
    missing = (runner.chunk if runner.padded else 2) - len(tokens)
    for i in range(missing):
        where[0].append(tokens[-1])
        where[1].append(positions[-1] + (i + 1 if runner.padded else 0))
        where[2].append(rows[-1])
    chosen = [*wanted, *[0] * max(0, 2 - len(wanted))]
    places = torch.tensor(where, device=runner.device)
    index = torch.tensor(chosen, device=runner.device)
    if runner.compiled:
        if not runner.padded:
            torch._dynamo.maybe_mark_dynamic(places, 1)
        torch._dynamo.maybe_mark_dynamic(index, 0)
    return runner.steps[EXTEND](places, index)[: len(wanted)]


@dataclass(frozen=True)
class Span:
    """Tokens of the sequence in slot `row`, the first at `position`. `wanted`: the logits of how many
    of the last tokens are returned."""

    row: int
    position: int
    tokens: Sequence[int]
    wanted: int = 1


def extend_rows(runner: Runner, spans: Sequence[Span]) -> Tensor:
    """`extend` for any number of tokens, in as few calls as possible. Returns the wanted logits,
    float32 [M, vocab_size], in the order of the spans (at most one for each slot) and of their
    tokens."""
    ends = {span.row: span.position + len(span.tokens) for span in spans}
    by_row = {span.row: span for span in spans}
    found = []
    parts = [(span.row, span.position, ends[span.row]) for span in spans]
    for call in split_prompts(parts, runner.chunk, runner.mixed):
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        wanted: list[int] = []
        for piece in call:
            span = by_row[piece.row]
            begin, end = piece.begin - span.position, piece.end - span.position
            first = max(piece.begin, ends[piece.row] - span.wanted) - piece.begin
            wanted += range(len(tokens) + first, len(tokens) + end - begin)
            tokens += span.tokens[begin:end]
            positions += range(piece.begin, piece.end)
            rows += [piece.row] * (end - begin)
        found.append(extend(runner, tokens, positions, rows, wanted))
    return found[0] if len(found) == 1 else torch.cat(found)


@torch.no_grad()
def warm_up(
    runner: Runner, names: Sequence[str], progress: Callable[[str], Any] = lambda name: None
) -> float:
    """Run each of the steps `names` once, which compiles it; returns the seconds this took. `progress`
    is called with each name.

    These steps write into the cache; generation overwrites that before it is read.
    """
    start = time.perf_counter()
    zeros = torch.zeros(runner.num_rows, dtype=torch.int64, device=runner.device)
    for name in names:
        progress(name)
        if name == EXTEND:
            count = min(5, runner.chunk)
            extend(runner, [0] * count, range(count), [0] * count, [0, 1, 2])
        elif name == BEAMS:
            shape = (runner.num_rows, runner.cache_len)
            sources = torch.zeros(shape, dtype=torch.int32, device=runner.device)
            runner.steps[name](zeros, zeros.clone(), sources)
        else:
            # Separate tensors, as in the loop: one tensor for both would need another graph.
            runner.steps[name](zeros, zeros.clone())
    return time.perf_counter() - start

"""Estimates the memory that each rank of a job needs: weights, KV cache, workspace.

Does not import torch. Weights are counted with the loader's own table and rules, so that the estimate
and the load agree. The file's header says how it stores them (weights.outline). Not here: how much
memory the machine has (`launcher.fit` compares the two).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace

from base.errors import InputError
from engine.chunks import CHUNK
from engine.dtypes import BYTES, dtype_name, kv_dtype_name
from engine.job import Job, fitted_length
from engine.resolve import ResolvedJob
from models.config import EMBEDDING, HEAD, ModelConfig
from models.config_gguf import from_gguf
from models.config_hf import from_hf
from models.quant_rules import Held, check_cuts, held_quantized, layers_of, weight_bytes
from models.sizes import layout_of
from weights.files import read_json
from weights.locate import locate
from weights.outline import Outline, StoredWeight, read_outline, same_numbers

# The interpreter, torch, the compiled code and memory that compiling leaves allocated; measured as a
# rank's peak resident memory minus its weights and cache (docs/log.md).
BASE_BYTES = 600 << 20
_MOST_WEIGHTS = 1 << 18  # bound on the number of weights where the file's are not listed
MAX_BATCH = 8  # slots, unless the user gives batch=


@dataclass(frozen=True)
class Workload:
    """What a model is loaded for: the cache has `num_rows` slots of `max_seq_len` tokens; each verifies
    up to `draft_tokens` draft tokens in one call; `held` lists the layers with quantized weights."""

    dtype: str
    max_seq_len: int
    num_rows: int = 1
    kv_dtype: str = "auto"
    draft_tokens: int = 0
    held: Collection[Held] = ()


def rank_needs(config: ModelConfig, work: Workload, rank: int, world_size: int) -> dict[str, int]:
    """Returns the bytes that one rank holds, by purpose: `weights`, `kv_cache`, `workspace`. Raises
    InputError if the model cannot be split over `world_size` ranks."""
    item, num_rows = BYTES[dtype_name(work.dtype)], work.num_rows
    layout = layout_of(config, rank, world_size)
    name = kv_dtype_name(work.kv_dtype, work.dtype)
    # An int8 cache has a float32 scale for each token and head.
    head_bytes = config.head_dim * BYTES[name] + (4 if name == "int8" else 0)
    kv_cache = 2 * config.num_layers * layout.heads.num_kv * head_bytes * work.max_seq_len * num_rows
    # A chunk's widest activations, twice (input and output), and the gathered logits of all ranks.
    activations = 2 * CHUNK * max(layout.ffn_stop - layout.ffn_start, layout.expert_stop) * 2 * item
    num_logits = max(2, num_rows, min(num_rows * (1 + work.draft_tokens), CHUNK))
    logits = 2 * num_logits * layout.vocab_block * world_size * 4
    return {
        "weights": weight_bytes(config, layout, item, work.held),
        "kv_cache": kv_cache,
        "workspace": BASE_BYTES + activations + logits,
    }


def with_batch(resolved: ResolvedJob) -> ResolvedJob:
    """Returns the job with `batch` set: the given number, else one slot for each prompt, at most
    MAX_BATCH. A beam search takes one slot for each beam."""
    job = resolved.job
    batch = job.batch or max(1, min(MAX_BATCH, len(resolved.prompts)))
    if job.num_beams > 1:
        batch = job.num_beams
    return replace(resolved, job=replace(job, batch=batch))


def smaller_batch(asked: ResolvedJob, tried: ResolvedJob) -> ResolvedJob | None:
    """Returns `tried` with half its batch, None if it is 1 or `asked` fixes it (batch=, beams)."""
    if asked.job.batch or asked.job.num_beams > 1 or tried.job.batch == 1:
        return None
    return replace(tried, job=replace(tried.job, batch=tried.job.batch // 2))


def job_needs(
    resolved: ResolvedJob, world_size: int, thorough: bool, max_seq_len: int | None = None
) -> list[dict[str, int]]:
    """Returns what each rank of a job needs, in bytes by purpose; `resolved` is from `with_batch`.

    [] where the dimensions are not known without opening the weights and `thorough` is False (opening
    them imports torch, which takes seconds). `max_seq_len` None: the job's, fitted to the model. Raises
    InputError if the model does not have that length, or cannot be cut for so many ranks."""
    outline = None if resolved.checkpoint is None else read_outline(resolved.checkpoint)
    config = resolved.config or _declared(resolved, outline, thorough)
    if config is None:
        return []
    job = resolved.job
    if max_seq_len is None:
        own = job.engine != "hf"  # with engine=hf the rank reads the limit from transformers' config
        max_seq_len = (
            fitted_length(job, config.max_seq_len, config.stretched_from) if own else job.max_seq_len
        )
    work = Workload(
        job.dtype,
        max_seq_len,
        max(job.batch, 1),
        job.kv_dtype,
        job.draft_tokens if job.draft else 0,
        _held(resolved, config, outline, world_size),
    )
    needs = [rank_needs(config, work, rank, world_size) for rank in range(world_size)]
    if resolved.draft is not None:
        small = replace(resolved.draft, job=replace(resolved.draft.job, batch=job.batch))
        try:
            draft = job_needs(small, world_size, thorough, max_seq_len)
        except InputError as error:
            raise InputError(f"draft={job.draft}: {error}") from error
        for need, more in zip(needs, draft, strict=False):
            need["draft"] = more["weights"] + more["kv_cache"]
    return needs


def _held(
    resolved: ResolvedJob, config: ModelConfig, outline: Outline | None, world_size: int
) -> list[Held]:
    """The layers that hold quantized weights, by the loader's own rule. A weight that the header does
    not list counts as plain. Raises InputError if the file's weights cannot be cut for these ranks."""
    quant = resolved.quant
    if quant is None:
        return []
    if quant.asked is None and (outline is None or not keeps_quantized(resolved.job)):
        return []
    known = {} if outline is None else outline.weights
    with_experts = sum(map(config.has_experts, range(config.num_layers)))
    if config.num_layers + 3 * with_experts * config.num_experts > (len(known) or _MOST_WEIGHTS):
        return []  # the file lacks weights that the config claims; the rank reports which
    plain = StoredWeight("BF16")
    stored = {name: known.get(name, plain) for names in layers_of(config) for name in names}
    held = held_quantized(config, stored, quant.asked, resolved.job.device == "cuda")
    check_cuts(config, held, world_size)
    return held


def keeps_quantized(job: Job, device: str = "cpu") -> bool:
    """Whether a job keeps the quantized weights of its file: with quant=auto, where our kernels for
    them run (on a CPU, in bfloat16, not with engine=hf)."""
    on_cpu = device == "cpu" and job.device != "cuda"
    own = dtype_name(job.dtype, device) == "bfloat16" and job.engine != "hf"
    return job.quant == "auto" and on_cpu and own


def _with_own_head(config: ModelConfig, outline: Outline | None) -> ModelConfig:
    """`config`, with tie_embeddings cleared if the file stores a head whose numbers differ from the
    embedding. `models.tying` decides the same and knows more formats: what cannot be compared here
    counts as a separate head."""
    stored = {} if outline is None else outline.weights
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    if not config.tie_embeddings or head is None or embedding is None:
        return config
    return config if same_numbers(head, embedding) else replace(config, tie_embeddings=False)


def _declared(resolved: ResolvedJob, outline: Outline | None, thorough: bool) -> ModelConfig | None:
    checkpoint = resolved.checkpoint
    if checkpoint is None:
        return None
    own = outline is not None and outline.format == "gguf"  # GGUF files describe themselves
    file = locate(checkpoint).folder / "config.json"
    if file.is_file() and not own:
        try:
            found = read_json(file)
        except InputError:
            return None  # the rank that opens it reports the error
        try:
            return _with_own_head(from_hf(found, str(file)), outline)
        except InputError:
            if resolved.job.engine != "hf":
                raise
            return None  # a family that only transformers knows: no estimate
    if outline is not None and outline.format == "gguf":
        with suppress(InputError):  # the rank reports it
            return from_gguf(outline.config, outline.weights, str(checkpoint))
    if not thorough:
        return None
    from models.load import config_of
    from weights.open import open_checkpoint

    return config_of(open_checkpoint(checkpoint))

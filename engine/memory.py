"""What a rank must hold to run a job: weights, KV cache, workspace. Free of torch.

The weights are counted with the loader's own table and rules, so that the estimate and the load agree;
how a file stores them is told by its header (weights.outline). What is not here: what the machine has
(`launcher.fit` compares).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

from base.errors import InputError
from engine.dtypes import BYTES, dtype_name, kv_dtype_name
from engine.job import Job, fitted_length, quant_of
from engine.resolve import ResolvedJob
from models.config import EMBEDDING, HEAD, ModelConfig
from models.config_gguf import from_gguf
from models.config_hf import from_hf
from models.quant_rules import Held, held_quantized, parse_asked, products_of, weight_bytes
from models.sizes import layout_of
from weights.files import read_json
from weights.locate import locate
from weights.outline import Outline, Stored, read_outline, same_numbers
from weights.schemes import SCHEMES

# The interpreter, torch, the compiled code and what compiling leaves behind; measured as a rank's peak
# resident memory less its weights and cache (docs/log.md).
BASE_BYTES = 600 << 20
CHUNK = 512  # tokens of prompts that are run at once: below that, products wait for the weights
PADDED_CHUNK = 128  # the same where each call has this length
_MOST_WEIGHTS = 1 << 18  # of a model of which nobody has listed them
MAX_BATCH = 8  # rows, where nobody asks for another number


def cache_length(max_seq_len: int, padded: bool) -> int:
    """Positions that a cache row needs: padding of a last chunk has a place to go."""
    return max_seq_len + PADDED_CHUNK if padded else max_seq_len


def rank_needs(
    config: ModelConfig,
    dtype: str,
    max_seq_len: int,
    rank: int,
    world_size: int,
    num_rows: int = 1,
    kv_dtype: str = "auto",
    guesses: int = 0,
    held: Collection[Held] = (),
) -> dict[str, int]:
    """Bytes that one rank holds, by purpose, with a cache of `num_rows` texts and up to so many
    `guesses` to be verified in each at once. `held` are the products with quantized weights. Raises
    InputError where the model cannot be split so."""
    item = BYTES[dtype_name(dtype)]
    layout = layout_of(config, rank, world_size)
    name = kv_dtype_name(kv_dtype, dtype)
    # int8 has a scale, float32, for each token and head.
    head_bytes = config.head_dim * BYTES[name] + (4 if name == "int8" else 0)
    kv_cache = 2 * config.num_layers * layout.heads.num_kv * head_bytes * max_seq_len * num_rows
    # A chunk's widest activations, twice (in and out), and the rows of logits of all ranks.
    activations = 2 * CHUNK * max(layout.ffn_stop - layout.ffn_start, layout.expert_stop) * 2 * item
    num_logits = max(2, num_rows, min(num_rows * (1 + guesses), CHUNK))
    logits = 2 * num_logits * layout.vocab_block * world_size * 4
    return {
        "weights": weight_bytes(config, layout, item, held),
        "kv_cache": kv_cache,
        "workspace": BASE_BYTES + activations + logits,
    }


def with_batch(resolved: ResolvedJob) -> ResolvedJob:
    """The job with the number of texts that it makes at once: as asked for, or up to MAX_BATCH."""
    job = resolved.job
    batch = job.batch or max(1, min(MAX_BATCH, len(resolved.prompts)))
    if job.num_beams > 1:
        batch = job.num_beams
    return replace(resolved, job=replace(job, batch=batch))


def smaller_batch(asked: ResolvedJob, tried: ResolvedJob) -> ResolvedJob | None:
    """`tried` with half as many texts at once; None where the job asked for that number."""
    if asked.job.batch or asked.job.num_beams > 1 or tried.job.batch == 1:
        return None
    return replace(tried, job=replace(tried.job, batch=tried.job.batch // 2))


def job_needs(
    resolved: ResolvedJob, world_size: int, thorough: bool, max_seq_len: int | None = None
) -> list[dict[str, int]]:
    """What each rank of a job `with_batch` needs; [] where the dimensions cannot be told without
    opening the weights and `thorough` does not ask for that (it loads torch, which takes seconds).
    `max_seq_len` None: as the job asks, and the model can have it. Raises InputError if it cannot."""
    outline = None if resolved.checkpoint is None else read_outline(resolved.checkpoint)
    config = resolved.config or _declared(resolved, outline, thorough)
    if config is None:
        return []
    job = resolved.job
    held = _held(job, config, outline, world_size)
    guesses = job.draft_tokens if job.draft else 0
    if max_seq_len is None:
        own = job.engine != "hf"  # what transformers makes of the file, its config says at the rank
        max_seq_len = (
            fitted_length(job, config.max_seq_len, config.stretched_from) if own else job.max_seq_len
        )
    needs = [
        rank_needs(
            config,
            job.dtype,
            max_seq_len,
            rank,
            world_size,
            max(job.batch, 1),
            job.kv_dtype,
            guesses,
            held,
        )
        for rank in range(world_size)
    ]
    if resolved.draft is not None:
        small = replace(resolved.draft, job=replace(resolved.draft.job, batch=job.batch))
        draft = job_needs(small, world_size, thorough, max_seq_len)
        for need, more in zip(needs, draft, strict=False):
            need["draft"] = more["weights"] + more["kv_cache"]
    return needs


def _held(job: Job, config: ModelConfig, outline: Outline | None, world_size: int) -> list[Held]:
    """Which products hold quantized weights: as the loader decides it. What a file is not known to have
    quantized is taken for plain."""
    asked = parse_asked(quant_of(job)) if job.quant in SCHEMES else None
    if asked is None and (outline is None or not keeps_quantized(job)):
        return []
    known = {} if outline is None else outline.weights
    with_experts = sum(map(config.has_experts, range(config.num_layers)))
    if config.num_layers + 3 * with_experts * config.num_experts > (len(known) or _MOST_WEIGHTS):
        return []  # the file lacks weights that the config claims; the rank says which
    products = products_of(config)
    plain = Stored("BF16")
    stored = {name: known.get(name, plain) for names in products for name in names}
    return held_quantized(config, products, stored, asked, world_size)


def keeps_quantized(job: Job, device: str = "cpu") -> bool:
    """Whether a job's layers hold what its file has quantized: with quant=auto, where our own products
    are used."""
    on_cpu = device == "cpu" and job.device != "cuda"
    own = dtype_name(job.dtype, device) == "bfloat16" and job.engine != "hf"
    return job.quant == "auto" and on_cpu and own


def _with_own_head(config: ModelConfig, outline: Outline | None) -> ModelConfig:
    """`config`, without a tie that what is stored does not have (as `models.tying`, which knows more
    formats: what cannot be compared here is counted as a head)."""
    stored = {} if outline is None else outline.weights
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    if not config.tie_embeddings or head is None or embedding is None:
        return config
    return config if same_numbers(head, embedding) else replace(config, tie_embeddings=False)


def _declared(resolved: ResolvedJob, outline: Outline | None, thorough: bool) -> ModelConfig | None:
    checkpoint = resolved.checkpoint
    if checkpoint is None:
        return None
    own = outline is not None and outline.format == "gguf"  # which tells of itself
    file = locate(checkpoint).folder / "config.json"
    if file.is_file() and not own:
        try:
            found = read_json(file)
        except InputError:
            return None  # the rank that opens it says what is wrong
        try:
            return _with_own_head(from_hf(found, str(file)), outline)
        except InputError:
            if resolved.job.engine != "hf":
                raise
            return None  # a family that only transformers knows: there is no estimate
    if outline is not None and outline.format == "gguf":
        with suppress(InputError):  # the rank says that
            return from_gguf(outline.config, outline.weights, str(checkpoint))
    if not thorough:
        return None
    from models.load import config_of
    from weights.open import open_checkpoint

    return config_of(open_checkpoint(checkpoint))

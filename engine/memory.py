"""What a rank must hold to run a job: weights, KV cache, workspace. Pure, and free of torch.

The weights are counted with the loader's own table, so that the estimate and the load agree. What is
not here: what the machine has (`launcher.fit` compares).
"""

from __future__ import annotations

import json
from functools import cache
from math import prod
from pathlib import Path

from engine.job import ResolvedJob
from models.config import ModelConfig
from models.config_hf import from_hf
from models.sizes import layout_of, weight_kinds
from tp.shard import slices_of
from weights.errors import InputError

# The interpreter, torch, the compiled code and what compiling leaves behind; measured as a rank's peak
# resident memory less its weights and cache (docs/log.md).
BASE_BYTES = 600 << 20
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHUNK = 128  # tokens of a prompt that are run at once


@cache
def dtype_name(name: str) -> str:
    """`auto` is bfloat16 where the processor multiplies it in hardware, else float32."""
    if name != "auto":
        return name
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    # x86 lists avx512_bf16 and amx_bf16, Arm bf16.
    return "bfloat16" if "bf16" in flags else "float32"


def rank_needs(
    config: ModelConfig, dtype: str, max_seq_len: int, rank: int, world_size: int
) -> dict[str, int]:
    """Bytes that one rank holds, by purpose. Raises InputError where the model cannot be split so."""
    item = _BYTES[dtype_name(dtype)]
    layout = layout_of(config, rank, world_size)
    weights = sum(
        kind.count * prod(part.stop - part.start for part in slices_of(kind.name, kind.shape, layout))
        for kind in weight_kinds(config)
    )
    cache_len = -(-max_seq_len // CHUNK) * CHUNK
    kv_cache = 2 * config.num_layers * layout.heads.num_kv * config.head_dim * cache_len
    # A chunk's widest activations, twice (in and out), and the rows of logits of all ranks.
    activations = 2 * CHUNK * max(layout.ffn_stop - layout.ffn_start, layout.expert_stop) * 2 * item
    logits = 2 * layout.vocab_block * world_size * 4
    return {
        "weights": weights * item,
        "kv_cache": kv_cache * item,
        "workspace": BASE_BYTES + activations + logits,
    }


def job_needs(resolved: ResolvedJob, world_size: int, thorough: bool) -> list[dict[str, int]]:
    """What each rank of a job needs; [] where the dimensions cannot be told without opening the
    weights and `thorough` does not ask for that (it loads torch, which takes seconds)."""
    config = resolved.config or _declared(resolved, thorough)
    if config is None:
        return []
    job = resolved.job
    return [
        rank_needs(config, job.dtype, job.max_seq_len, rank, world_size) for rank in range(world_size)
    ]


def _declared(resolved: ResolvedJob, thorough: bool) -> ModelConfig | None:
    checkpoint = resolved.checkpoint
    if checkpoint is None:
        return None
    file = checkpoint / "config.json"
    if file.is_file():
        try:
            return from_hf(json.loads(file.read_text()), str(file))
        except json.JSONDecodeError:
            return None  # the rank that opens it says what is wrong
        except InputError:
            if resolved.job.engine != "hf":
                raise
            return None  # a family that only transformers knows: there is no estimate
    if not thorough:
        return None
    from models.load import config_of
    from weights.checkpoint import open_checkpoint

    return config_of(open_checkpoint(checkpoint))

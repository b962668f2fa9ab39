"""llama.cpp's side of bench/peers.py: a worker in the environment with llama-cpp-python.

It imports nothing of Yoke. The first line on stdin, JSON, says what to open. Each later line names a
variant, and a line on stdout answers with a sample of it. Between samples the worker blocks in a read;
OpenMP's threads, which spin for some milliseconds after their work, are asleep by then.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from llama_cpp._logger import set_verbose  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    task = json.loads(sys.stdin.readline())
    set_verbose(False)
    llama.llama_backend_init()
    opened = {name: open_context(spec, task) for name, spec in task["variants"].items()}
    system = " ".join(llama.llama_print_system_info().decode().split())
    report({"version": llama.__version__, "system": system})
    waited = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - waited
        context, vocab_size = opened[line.strip()]
        found = sample(context, vocab_size, task["prompt"], task["tokens"])
        report(found | {"idle_cpu_s": idle})
        waited = time.process_time()


def report(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def open_context(spec: dict[str, Any], task: dict[str, Any]) -> tuple[Any, int]:
    """A file loaded into memory, with a cache, and the size of its vocabulary."""
    model_params = llama.llama_model_default_params()
    model_params.use_mmap = False  # private memory, as in Yoke: huge pages if the system provides them
    model = llama.llama_model_load_from_file(spec["path"].encode(), model_params)
    if not model:
        sys.exit(f"llama.cpp cannot open {spec['path']}")
    params = llama.llama_context_default_params()
    params.n_ctx = task["max_seq_len"]
    params.n_batch = params.n_ubatch = max(512, len(task["prompt"]))
    params.n_threads = params.n_threads_batch = task["threads"]
    params.flash_attn_type = (
        llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if spec["flash"] else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    context = llama.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama.cpp cannot create a context for {spec}")
    return context, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))


def sample(context: Any, vocab_size: int, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Run the prompt from an empty cache, then generate `tokens` greedy tokens after the first. Returns
    times in seconds and the tokens."""
    llama.llama_memory_clear(llama.llama_get_memory(context), False)
    start = time.perf_counter()
    made = [advance(context, vocab_size, prompt)]
    first = time.perf_counter()
    for _ in range(tokens):
        made.append(advance(context, vocab_size, made[-1:]))
    end = time.perf_counter()
    return {"ttft_s": first - start, "tpot_s": (end - first) / tokens, "tokens": made}


def advance(context: Any, vocab_size: int, tokens: list[int]) -> int:
    """Run tokens after those in the cache; returns the greedy next token."""
    array = (llama.llama_token * len(tokens))(*tokens)
    if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
        sys.exit("llama_decode failed")
    logits = llama.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(ctypes.cast(logits, FLOATS), (vocab_size,)).argmax())


FLOATS = ctypes.POINTER(ctypes.c_float)

if __name__ == "__main__":
    main()

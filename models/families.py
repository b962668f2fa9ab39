"""The families by name: the architectures that files call them, their block and their presets.

This list serves tables and help. The readers (`models.config_hf`, `models.config_gguf`) and the blocks
do the work, and a test compares this list with both. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from weights.formats.gguf_names import ARCHITECTURES as GGUF_ARCHITECTURES


@dataclass(frozen=True)
class Family:
    """`hf`: the architecture's name in config.json. `gguf`: its name in llama.cpp's files, whether or
    not such files are read here. `presets`: prefixes of the names of its presets. `what`: a remark."""

    name: str
    block: str
    hf: str
    gguf: str
    presets: tuple[str, ...]
    what: str

    @property
    def read_gguf(self) -> str:
        """The name in GGUF files if Yoke reads such files, else ""."""
        return self.gguf if self.gguf in GGUF_ARCHITECTURES else ""


FAMILIES: tuple[Family, ...] = (
    Family(
        "Llama", "llama", "LlamaForCausalLM", "llama", ("tiny", "llama-", "smollm2-"),
        "1 to 3.2, SmolLM 2, and their derivatives",
    ),
    Family(
        "SmolLM3", "llama", "SmolLM3ForCausalLM", "smollm3", ("smollm3-",),
        "every fourth layer has no rotary embeddings",
    ),
    Family("Mistral", "llama", "MistralForCausalLM", "llama", ("mistral-",), "sliding window"),
    Family("Mixtral", "llama", "MixtralForCausalLM", "llama", ("mixtral-",), "experts"),
    Family("Qwen2", "llama", "Qwen2ForCausalLM", "qwen2", ("qwen2.5-",), "biases; 2 and 2.5"),
    Family("Qwen3", "llama", "Qwen3ForCausalLM", "qwen3", ("qwen3-",), "norms of queries and keys"),
    Family(
        "Qwen3 MoE", "llama", "Qwen3MoeForCausalLM", "qwen3moe", ("qwen3-30b-a3b", "qwen3-235b-a22b"),
        "the same with experts",
    ),
    Family(
        "Phi", "llama", "Phi3ForCausalLM", "phi3", ("phi-",),
        "3, 3.5, 4 and 4-mini; fused weights, longrope, partial rotation",
    ),
    Family("Granite", "llama", "GraniteForCausalLM", "granite", ("granite-",), "scaled throughout"),
    Family(
        "Gemma 2", "gemma", "Gemma2ForCausalLM", "gemma2", ("gemma-2-",),
        "capped scores and logits, every other layer has a window",
    ),
    Family(
        "Gemma 3", "gemma", "Gemma3ForCausalLM", "gemma3", ("gemma-3-",),
        "five of six layers have a window; text models",
    ),
    Family(
        "GPT-J", "parallel", "GPTJForCausalLM", "gptj", ("gpt-j-",),
        "neighboring numbers are rotated",
    ),
    Family("Falcon", "parallel", "FalconForCausalLM", "falcon", ("falcon-",), "7B, 11B, 40B"),
)  # fmt: skip


def family_of(preset: str) -> Family:
    """The family of a preset, by the longest prefix that matches its name."""
    fitting = [(len(p), f.name, f) for f in FAMILIES for p in f.presets if preset.startswith(p)]
    assert fitting, preset
    return max(fitting)[2]

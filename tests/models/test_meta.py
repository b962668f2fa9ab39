"""Meta's own layout, end to end: Llama 3.1's frequencies, which its params.json only mentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from comm.group import Group
from models.load import config_of, load_model
from models.rope import frequencies
from tests.weights.samples import CONFIG, HEAD_DIM, llama, write_meta
from weights.open import open_checkpoint


@pytest.mark.parametrize(("more", "factor"), [({}, 32.0), ({"rope_scaling_factor": 8.0}, 8.0)])
def test_scaled_rope(more: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """The waves that are stretched are thousands of tokens long: a short text hardly shows it, so the
    frequencies are compared, too."""
    theta = 1e12
    folder = write_meta(tmp_path / "m", llama(), 2, use_scaled_rope=True, rope_theta=theta, **more)
    checkpoint = open_checkpoint(folder)
    config = config_of(checkpoint)
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    values = {key: value for key, value in CONFIG.items() if key != "architectures"}
    theirs = LlamaConfig(
        **values | {"rope_parameters": rope, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    )
    assert config.max_seq_len == 131072
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    found = frequencies(config.rope, HEAD_DIM, 100)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
    plain = theta ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    stretched = plain / found
    assert stretched[0] == pytest.approx(1) and stretched[-1] == pytest.approx(factor)
    model = LlamaForCausalLM(theirs).float()
    model.load_state_dict({name: value.float() for name, value in llama().items()})
    ours = load_model(config, checkpoint, Group(0, 1), torch.float32)
    tokens = torch.randint(0, config.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    ours.setup(1, 100)
    with torch.no_grad():
        logits = ours(tokens, torch.arange(100), torch.tensor([99]))
        torch.testing.assert_close(logits, model(tokens).logits[:, -1], rtol=1e-4, atol=1e-5)

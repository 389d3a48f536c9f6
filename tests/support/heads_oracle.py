"""The oracle of head scores: eager attention of transformers in float64, then loops over tokens and copies.

Slow, literal, and blind to how the package does it. Tiny random checkpoints of three families.
"""

from __future__ import annotations

import functools
import tempfile

import numpy as np
import torch
import transformers

from razor_jax.checkpoint import folder as checkpoint
from razor_jax.heads import HeadScores, find_heads
from razor_jax.heads.probe import Layout, ordinary_ids, probe_tokens
from razor_jax.params import Params

L, N, K, H = 3, 6, 2, 8
BLOCK = 15  # (max_position_embeddings - 1) // 4
REPEATS = 4
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny_model(family: str) -> torch.nn.Module:
    """A tiny random model with attention far from uniform, float32."""
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=61,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=4 * BLOCK + 1,
        initializer_range=0.3,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.5 if "norm" in name else 0.0, std=0.3)
    return model.eval()


def attention_maps(model: torch.nn.Module, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """float64 [L, N, P, P] post-softmax."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens[None], dtype=torch.long),
            position_ids=None if positions is None else torch.tensor(positions[None], dtype=torch.long),
            output_attentions=True,
        )
    return np.stack([a[0].double().numpy() for a in out.attentions])


def oracle_scores(maps: np.ndarray, block: int, *, shift: int, per_pair: bool = False) -> np.ndarray:
    """float64 [L, N]: mass on token j + shift for each earlier copy j, summed, averaged over tokens."""
    maps = maps[:, :, 1:, 1:]  # the prefix is no target, and the softmax stays as it was
    total, rows, pairs = np.zeros(maps.shape[:2]), 0, 0
    for i in range(block, maps.shape[2]):
        rows += 1
        for j in range(i - block, -1, -block):
            total += maps[:, :, i, j + shift]
            pairs += 1
    return total / (pairs if per_pair else rows)


def group_max(scores: np.ndarray) -> np.ndarray:
    return scores.reshape(len(scores), K, N // K).max(-1)


def probe_of(params: Params, seed: int) -> np.ndarray:
    """The very tokens that find_heads feeds for a seed: first ordinary id, then the block."""
    return probe_tokens(0, ordinary_ids(params)[1:], Layout(BLOCK), seed)


@functools.cache
def pair(family: str) -> tuple[torch.nn.Module, Params]:
    """The same checkpoint in transformers (float64) and here."""
    model = tiny_model(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model.double(), checkpoint.read(folder)


@functools.cache
def maps_of(family: str, seed: int = 0) -> np.ndarray:
    """Attention maps float64 [L, N, P, P] of one probe."""
    model, params = pair(family)
    return attention_maps(model, probe_of(params, seed))


@functools.cache
def found(family: str) -> HeadScores:
    """What find_heads says of seed 0."""
    return find_heads(pair(family)[1], chunk=16)

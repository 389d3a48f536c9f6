"""A tiny random model with a byte-level tokenizer and a chat template, shared by the tests of the host side."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from razor_jax import Assets, HeadSplit, Params, with_heads
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights

SPECIALS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = ModelConfig("llama", 264, 32, 48, 2, 4, 2, 16, 4096)
SPLIT = HeadSplit(((1,), ()), 2)  # one retrieval head in the first layer, none in the second


@functools.cache
def assets(eos: tuple[str, ...] = ("<|end|>",)) -> Assets:
    """One token a byte, so that any stop string may end inside a decode block."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*SPECIALS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return Assets(
        tokenizer_json=tokenizer.to_str(),
        chat_template=TEMPLATE,
        bos_id=0,
        eos_ids=tuple(vocab[t] for t in eos),
        special_tokens=(("bos_token", "<s>"), ("eos_token", "<|end|>")),
        tokenizer_config=json.dumps({}),
    )


@functools.cache
def params(seed: int = 0, text: bool = True) -> Params:
    """Random float32 weights, large enough that attention and next tokens depend on the context."""
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(
        lambda a: np.asarray(
            1 + 0.1 * rng.normal(size=a.shape) if a.ndim == 1 else 0.3 * rng.normal(size=a.shape), np.float32
        ),
        abstract_weights(CONFIG),
    )
    return with_heads(Params.from_flax({"params": weights}, CONFIG, assets() if text else None), SPLIT)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    """Random ordinary token ids int32 [length]."""
    return np.random.default_rng([seed, length]).integers(len(SPECIALS), CONFIG.vocab_size - 3, length).astype(np.int32)

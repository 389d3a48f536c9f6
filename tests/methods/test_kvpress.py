"""Kept tokens equal those of NVIDIA kvpress on the same random checkpoint, where its presses are faithful.

kvpress needs transformers below 5.3, so it has an environment of its own:
pip install kvpress "transformers<5.3" and this repository, then pytest tests/methods/test_kvpress.py
"""

from __future__ import annotations

import numpy as np
import pytest

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")
torch = pytest.importorskip("torch")

import transformers  # noqa: E402

import razor_jax  # noqa: E402
from razor_jax import methods  # noqa: E402
from tests.support import hf  # noqa: E402

TOKENS, KEPT = 90, 30
PAIRS = [
    (methods.KNorm(KEPT), lambda ratio: kvpress.KnormPress(ratio)),
    (methods.SnapKV(KEPT, window=16), lambda ratio: kvpress.SnapKVPress(ratio, window_size=16)),
    (methods.TOVA(KEPT), lambda ratio: kvpress.TOVAPress(ratio)),
    (methods.StreamingLLM(KEPT), lambda ratio: kvpress.StreamingLLMPress(ratio)),
    (methods.ExpectedAttention(KEPT), lambda ratio: kvpress.ExpectedAttentionPress(ratio)),
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def models(request, tmp_path_factory):
    """The same weights here, in transformers, and a prompt of different tokens."""
    folder = hf.write(tmp_path_factory.mktemp("checkpoint"), request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    ids = np.random.default_rng(0).permutation(hf.SIZES["vocab_size"])[:TOKENS]
    return razor_jax.load(folder, heads=None), model, ids.tolist()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_kept_keys_equal_those_of_kvpress(models, ours, theirs):
    params, model, ids = models
    press, cache = theirs(1 - (KEPT + 0.5) / TOKENS), transformers.DynamicCache()
    with torch.no_grad(), press(model):
        model.model(torch.tensor([ids]), past_key_values=cache)
    kept = razor_jax.prefill(params, ids, razor=ours)
    for layer, theirs_ in zip(kept.layers, cache.layers, strict=True):
        state = layer[0].state
        assert state.valid.tolist() == [[KEPT] * 2]
        for head in range(2):
            mine, other = np.asarray(state.k)[0, head, :KEPT], theirs_.keys[0, head].numpy()
            distance = ((mine[:, None] - other[None]) ** 2).sum(-1)
            assert sorted(distance.argmin(1)) == list(range(KEPT))
            assert distance.min(1).max() < 1e-8

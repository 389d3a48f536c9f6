"""The server's engine on a mesh: the answers of one device, token for token, by slot and by head."""

from __future__ import annotations

import numpy as np
import pytest

from razor_jax import RazorConfig
from razor_jax.server.generation import Generation
from razor_jax.text.sampling import Sampling

from ..support import engines
from ..support.engines import answers
from ..support.meshes import BALANCED, SPLIT, on, one_device

PAPER = RazorConfig(sinks=2, min_window=5, window_divisor=3)
STREAMING_INT8 = RazorConfig.compact(13, kv_dtype="int8", prefill_chunk=24)
SAMPLED = Sampling.of(temperature=0.9, top_k=50, repetition_penalty=1.2)


def request(id, length, max_tokens=12, sampling=engines.GREEDY, **fields):
    prompt = np.random.default_rng(length).integers(5, 60, length).tolist()
    return Generation(id, tuple(prompt), max_tokens, sampling, 3, **fields)


REQUESTS = (
    request("long", 100, 30),
    request("document", 75, checkpoints=(40,)),
    request("again", 75, checkpoints=(40,), logit_bias=((7, 3.0),)),
    request("drawn", 20, sampling=SAMPLED, logprobs=3, prompt_logprobs=True),
)


@pytest.mark.slow  # the quick suite has `server/test_http_hosts`
@pytest.mark.parametrize(
    ("split", "razor", "mesh", "layout"),
    [
        (SPLIT, engines.RAZOR, "data=1,model=8", "slot"),
        (SPLIT, PAPER, "data=1,model=4", "slot"),
        (BALANCED, STREAMING_INT8, "data=1,model=2", "head"),
        (SPLIT, None, "data=1,model=4", "head"),
    ],
    ids=["by slot", "paper's window by slot", "int8 by head", "dense"],
)
def test_a_mesh_gives_the_answers_of_one_device(split, razor, mesh, layout):
    params = one_device(split)
    sizes = {"prefix_bytes": 200_000, "page_tokens": 16}
    one, made = engines.engine(params, razor, **sizes), engines.engine(on(params, mesh), razor, **sizes)
    assert made.layout.spec.placement.layout == layout
    for requests in (REQUESTS[:1], REQUESTS[1:2], REQUESTS):
        for got, want in zip(answers(made, *requests), answers(one, *requests), strict=True):
            assert (got.tokens, got.reason) == (want.tokens, want.reason)
            assert got.finished.cached_tokens == want.finished.cached_tokens
            mine, theirs = ([each.logprob for each in h.prompt_logprobs + h.logprobs] for h in (got, want))
            # A value at the edge of two int8 steps may be rounded to either.
            assert mine == pytest.approx(theirs, abs=2e-3 if razor is STREAMING_INT8 else 1e-4)
    assert made.stats().cached_tokens == one.stats().cached_tokens > 0
    assert made.stats().compilations == 0


def test_a_mesh_that_the_engine_cannot_serve_is_refused():
    with pytest.raises(ValueError, match=r"a mesh of data=2: .* needs data=1; give all devices to model"):
        engines.engine(on(one_device(), "data=2,model=4"))
    for page in (8, 20):
        with pytest.raises(ValueError, match=f"page_tokens={page}: must be a multiple of 8, .* and at least 16"):
            engines.engine(on(one_device(), "data=1,model=8"), page_tokens=page)

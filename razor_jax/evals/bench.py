"""Speed and memory of one model under several cache policies: what `razor-jax bench` prints."""

from __future__ import annotations

import dataclasses
import os
import platform

import jax
import numpy as np

from ..config import RazorConfig
from ..params import Params, nonfinite
from ..text.generate import generate
from ..text.result import KVReport


@dataclasses.dataclass(frozen=True)
class Speed:
    """One policy at one context length; seconds exclude compilation.

    Attributes:
      prefill_seconds: reading the prompt.
      decode_seconds: per token, after the first.
      compile_seconds: of all programs, once.
    """

    context: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    kv: KVReport

    def to_dict(self) -> dict:
        """Return all fields with the rates, for JSON."""
        return dataclasses.asdict(self) | {
            "kv": self.kv.to_dict(),
            "prefill_tokens_per_second": self.context / self.prefill_seconds,
            "decode_tokens_per_second": 1 / self.decode_seconds,
        }


def measure(
    params: Params, razor: RazorConfig | None, *, context: int, new_tokens: int = 32, repeats: int = 3, seed: int = 0
) -> Speed:
    """Time a random prompt of `context` tokens and `new_tokens` more; the fastest of `repeats` after a warm-up.

    Raises ValueError for a model whose logits are not finite.
    """
    prompt = np.random.default_rng(seed).integers(0, params.config.vocab_size, context)
    # Without assets no stop token can end the run early.
    params = params.replace(assets=None)
    runs = [generate(params, prompt, max_new_tokens=new_tokens + 1, razor=razor) for _ in range(repeats + 1)]
    if any(run.finish_reason == "error" for run in runs):
        raise ValueError(nonfinite(params))
    timed = [run.timings for run in runs[1:]]
    return Speed(
        context=context,
        prefill_seconds=min(t.prefill_seconds for t in timed),
        decode_seconds=min(t.decode_seconds / t.decoded_tokens for t in timed),
        compile_seconds=runs[0].timings.compile_seconds,
        kv=runs[0].kv,
    )


def machine() -> dict[str, str]:
    """Return the chip, JAX and Python that the figures were measured on."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }

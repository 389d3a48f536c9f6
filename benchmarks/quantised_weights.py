"""The cost of int8 and int4 weights: logits, needles and bytes, beside bfloat16 weights of the same model.

    python -m benchmarks.quantised_weights [--model razor-mini] [--documents 16] [--facts 32] [--tokens 2048]

Logits of documents are compared with those of float32 weights, under dense attention. Held-out needles are asked under
the model's own Razor policy, with the document compressed before the question. Prints a table, and writes it as JSON
with --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np

import razor_jax
from razor_jax import functional, sharding
from razor_jax.evals import needle, protocol
from razor_jax.evals.bench import machine
from razor_jax.text import prompts


def logits(params: razor_jax.Params, rows: np.ndarray) -> np.ndarray:
    """Return float32 [B, T, V] of dense attention over ids [B, T]."""
    cache = functional.init_cache(params, batch=len(rows), capacity=rows.shape[1], razor=None)
    lengths = np.full(len(rows), rows.shape[1], np.int32)
    out, _ = jax.jit(functional.extend, static_argnums=4)(params, cache, rows, lengths, "all")
    return np.asarray(out)


def logit_errors(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Return the errors of logits [B, T, V]; `kl` is in nats per token."""
    p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=-1, keepdims=True) for x in (want, got))
    return {
        "largest error": float(np.abs(got - want).max()),
        "rms error": float(np.sqrt(np.mean((got - want) ** 2))),
        "rms logit": float(want.std()),
        "same next token": float((got.argmax(-1) == want.argmax(-1)).mean()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="razor-mini")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", dest="output", type=Path)
    options = parser.parse_args()

    exact = razor_jax.load(options.model, dtype="float32")
    kinds: dict[str, Any] = {
        "bfloat16": razor_jax.load(options.model, dtype="bfloat16"),
        "int8": razor_jax.load(options.model, dtype="bfloat16", weights="int8"),
        "int4": razor_jax.load(options.model, dtype="bfloat16", weights="int4"),
    }
    grid = needle.Grid((options.tokens,), documents=options.documents, facts=options.facts)
    examples = needle.examples(exact, "facts", grid)
    texts = prompts.encode(exact, [example.document for example in examples[:4]]).rows
    rows = np.asarray([row[: min(map(len, texts))] for row in texts], np.int32)
    want = logits(exact, rows)
    results: dict[str, Any] = {}
    for name, params in kinds.items():
        nbytes, _ = sharding.weight_bytes(params.weights, None)
        results[name] = {"bytes": nbytes, **logit_errors(logits(params, rows), want)}
    policy = kinds["bfloat16"].razor or razor_jax.RazorConfig()
    settings = [protocol.CachedModel(name, params, policy) for name, params in kinds.items()]
    table = protocol.run(settings, examples, max_new_tokens=needle.ANSWER_TOKENS, batch=16)
    for row in table.rows:
        results[row.name] |= {"questions": row.scores.size, "right": float(row.scores.mean())}
        print(row.name, json.dumps(results[row.name]), flush=True)
    if options.output:
        command = f"python -m benchmarks.quantised_weights {' '.join(sys.argv[1:])}"
        record = {
            "date": str(date.today()),
            "command": command,
            "machine": machine(),
            "model": options.model,
            **results,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Does an installed razor_jax work? `python scripts/smoke.py`, from any folder; a minute, no test tools needed.

Loads the packaged model, hides facts in a document, compresses it, asks for the facts, and checks that the bytes
were really saved.
"""

import sys

import jax
import numpy as np
from tokenizers import Tokenizer

import razor_jax
from razor_jax.needles.facts import needle_document
from razor_jax.tokenizer.questions import split


def main() -> None:
    params = razor_jax.load("razor-mini")
    assert params.assets is not None
    assert params.assets.tokenizer_json is not None
    tokenizer = Tokenizer.from_str(params.assets.tokenizer_json)
    document = needle_document(np.random.default_rng(0), tokenizer, tokens=1500, facts=4)
    asked = split(params.assets, document.text, [fact.question for fact in document.facts], chat=True)
    cache = razor_jax.prefill(params, asked.document)
    results = razor_jax.generate(params, list(asked.questions), cache=cache, max_new_tokens=24)
    right = sum(fact.value in result.text for fact, result in zip(document.facts, results, strict=True))
    print(f"jax {jax.__version__} on {jax.default_backend()}, python {sys.version.split()[0]}")
    print(f"{right} of {len(document.facts)} answers right; {results[0].kv}")
    if not results[0].kv.engaged or results[0].kv.ratio < 1.5 or right == 0:
        raise SystemExit("the packaged model does not work here")


if __name__ == "__main__":
    main()

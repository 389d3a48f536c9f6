"""Dense retrieval accuracy of a razor-mini checkpoint, on held-out text, names and random ids.

Teacher-forced greedy: an answer counts when every token of it is the arg max, which is when greedy decoding
would have said exactly it. All questions of a document share one pass; none sees another one.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from tokenizers import Tokenizer

from .. import checkpoint
from ..models import rope as rotary
from ..models.config import ModelConfig
from ..models.transformer import Transformer
from . import training, vocabulary
from .tasks import needle_document
from .text import ASSETS

_TURN = 40  # tokens reserved for a question and its answer


def needle_accuracy(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    tokens: int,
    documents: int = 16,
    facts: int = 4,
    seed: int = 1,
    split: str = "held_out",
) -> tuple[int, int, int]:
    """(answers right in every token, answers with the right digits, questions asked)."""
    exact = value = 0
    for index in range(documents):
        rng = np.random.default_rng([seed, tokens, index])
        document = needle_document(rng, tokenizer, tokens, facts, split)
        right = _branches(config, params, tokenizer, document, tokens)
        exact += sum(a for a, _ in right)
        value += sum(b for _, b in right)
    return exact, value, documents * facts


def copy_accuracy(config: ModelConfig, params: Any, tokens: int, rows: int = 4, seed: int = 1) -> tuple[int, int]:
    """(right, scored) next tokens in the second copy of tokens/2 random ids after BOS."""
    rng = np.random.default_rng([seed, tokens])
    low = len(vocabulary.SPECIALS)
    half = rng.integers(low, config.vocab_size, size=(rows, tokens // 2))
    ids = np.concatenate([np.zeros((rows, 1), np.int64), half, half], axis=1).astype(np.int32)
    branch = np.zeros(ids.shape[1], np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)
    best = np.stack([_best(config, params, row, positions, branch) for row in ids])
    start = tokens // 2 + 1  # the first id of the second copy cannot be foreseen
    right = best[:, start:-1] == ids[:, start + 1 :]
    return int(right.sum()), right.size


def _branches(config, params, tokenizer, document, tokens):
    """For each fact: is the whole answer right, are its digits right."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    v = vocabulary
    shared = encode(f"{v.BOS}{v.SYSTEM}{document.text}{v.END}")
    ids, positions, branch = list(shared), list(range(len(shared))), [0] * len(shared)
    spans = []
    for number, fact in enumerate(document.facts, start=1):
        question = encode(f"{v.USER}{fact.question}{v.END}{v.ASSISTANT}")
        answer = encode(fact.answer + v.END)
        spans.append((len(ids) + len(question), answer))
        ids += question + answer
        count = len(question) + len(answer)
        positions += range(len(shared), len(shared) + count)
        branch += [number] * count
    size = tokens + 8 + _TURN * len(document.facts)
    padding = size - len(ids)
    best = _best(
        config,
        params,
        np.pad(np.array(ids, np.int32), (0, padding)),
        np.pad(np.array(positions, np.int32), (0, padding)),
        np.pad(np.array(branch, np.int32), (0, padding)),
    )
    results = []
    for start, answer in spans:
        right = best[start - 1 : start - 1 + len(answer)] == np.array(answer)
        digits = np.array(vocabulary.is_digit(tokenizer, answer))
        results.append((bool(right.all()), bool(right[digits].all())))
    return results


@functools.partial(jax.jit, static_argnums=0)
def _best(config: ModelConfig, params: Any, ids: jax.Array, positions: jax.Array, branch: jax.Array) -> jax.Array:
    """Arg max of the next token, int32 [T]; a token sees its own branch and branch 0."""
    T = ids.shape[0]
    order = jnp.arange(T)
    visible = (order[:, None] >= order) & ((branch == 0) | (branch[:, None] == branch))

    def attend(q, k, v, state):
        B, K, R, H = q.shape
        q = q.reshape(B, K, T, R // T, H)
        z = jnp.einsum("bktgh,bksh->bkgts", q, k) * H**-0.5
        p = jax.nn.softmax(jnp.where(visible, z, -1e30), axis=-1)
        return jnp.einsum("bkgts,bksh->bktgh", p, v).reshape(B, K, R, H), state

    rope = rotary.tables(config.rope, config.head_dim, positions[None], jnp.full((1,), T))
    states = (None,) * config.num_layers
    logits, _ = Transformer(config).apply({"params": params}, ids[None], rope, attend, states)
    return jnp.argmax(logits[0], axis=-1)


def main(
    folder: Annotated[pathlib.Path, typer.Option(help="Exported model folder.")] = ASSETS / "razor-mini",
    documents: Annotated[int, typer.Option(min=1, help="Documents of four facts per length.")] = 16,
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens, comma-separated.")] = "512,1024,2048",
) -> None:
    """Print dense needle and copy accuracy of an exported razor-mini, one line a length."""
    if not (folder / "model.safetensors").is_file():
        raise typer.BadParameter(f"{folder} holds no model.safetensors; export one first", param_hint="--folder")
    sizes = lengths.split(",")
    if not all(size.strip().isdigit() for size in sizes):
        raise typer.BadParameter(f"{lengths!r} is not a list of token counts such as 512,1024", param_hint="--lengths")
    config, params = training.MINI, checkpoint.read(folder, "float32").weights
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokens in map(int, sizes):
        exact, value, asked = needle_accuracy(config, params, tokenizer, tokens, documents)
        right, scored = copy_accuracy(config, params, tokens)
        typer.echo(
            f"{tokens:5d} tokens: value {value}/{asked} ({value / asked:.1%}), whole answer {exact}/{asked} "
            f"({exact / asked:.1%}), copy {right}/{scored} ({right / scored:.1%})"
        )


if __name__ == "__main__":
    typer.run(main)

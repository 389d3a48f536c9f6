"""Dense accuracy of a razor-mini checkpoint by task family, length and depth, on held-out text, names and random ids.

    python -m recipes.evaluate [--lengths 1024,4096] [--families needle,alike] [--documents 25]

Teacher-forced greedy: an answer counts when every token of it is the arg max, which is when greedy decoding
would have said exactly it. All questions of a document share one pass; none sees another one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from tokenizers import Tokenizer

from razor_jax.checkpoint import folder as checkpoint
from razor_jax.models import rope as rotary
from razor_jax.models.config import ModelConfig
from razor_jax.models.transformer import Transformer
from razor_jax.needles.facts import FAMILIES, FamilyDocument, Question, family_document
from razor_jax.needles.text import ASSETS

from . import vocabulary

DEPTHS = 5  # equal parts of a document
_QUERY_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Result:
    """One question: where its first fact stands, is every token of the answer right, are its digits."""

    depth: float
    exact: bool
    value: bool


def family_results(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    family: str,
    tokens: int,
    documents: int = 25,
    facts: int = 8,
    seed: int = 1,
    split: str = "held_out",
) -> list[Result]:
    """Return every question of `documents` documents of one family."""
    results = []
    for index in range(documents):
        rng = np.random.default_rng([seed, tokens, index])
        document = family_document(rng, tokenizer, family, tokens, facts, split)
        results += _answered(config, params, tokenizer, document)
    return results


def copy_accuracy(config: ModelConfig, params: Any, tokens: int, rows: int = 4, seed: int = 1) -> tuple[int, int]:
    """Return (right, scored) next tokens in the second copy of tokens/2 random ids after BOS."""
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


def interval(right: int, asked: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z, share = 1.96, right / asked
    centre = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, centre - half), min(1.0, centre + half)


def _answered(config: ModelConfig, params: Any, tokenizer: Tokenizer, document: FamilyDocument) -> list[Result]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    v = vocabulary
    shared = encode(f"{v.BOS}{v.SYSTEM}{document.text}{v.END}")
    ids, positions, branch = list(shared), list(range(len(shared))), [0] * len(shared)
    spans: list[tuple[Question, int, np.ndarray]] = []
    for number, asked in enumerate(document.questions, start=1):
        question = encode(f"{v.USER}{asked.question}{v.END}{v.ASSISTANT}")
        answer = encode(asked.answer + v.END)
        spans.append((asked, len(ids) + len(question), np.array(answer)))
        count = len(question) + len(answer)
        ids += question + answer
        positions += range(len(shared), len(shared) + count)
        branch += [number] * count
    padding = -len(ids) % _QUERY_BLOCK
    padded = (np.pad(np.array(x, np.int32), (0, padding)) for x in (ids, positions, branch))
    best = _best(config, params, *padded)
    results = []
    for asked, start, answer in spans:
        right = best[start - 1 : start - 1 + len(answer)] == answer
        digits = np.array(vocabulary.is_digit(tokenizer, answer.tolist()))
        results.append(Result(asked.depth, bool(right.all()), bool(right[digits].all())))
    return results


@functools.partial(jax.jit, static_argnums=0)
def _best(config: ModelConfig, params: Any, ids: jax.Array, positions: jax.Array, branch: jax.Array) -> jax.Array:
    """Return the likeliest next token, int32 [T]; a token sees its own branch and branch 0."""
    T = ids.shape[0]
    order = jnp.arange(T)

    def attend(q, k, v, state):
        B, K, R, H = q.shape
        q = q.reshape(B, K, T, R // T, H)
        outs = []
        for t in range(0, T, _QUERY_BLOCK):  # each block against the keys up to its end
            new, old = slice(t, min(t + _QUERY_BLOCK, T)), slice(0, min(t + _QUERY_BLOCK, T))
            visible = (branch[old] == 0) | (branch[new, None] == branch[old])
            z = jnp.einsum("bktgh,bksh->bkgts", q[:, :, new], k[:, :, old]) * H**-0.5
            p = jax.nn.softmax(jnp.where(visible & (order[new, None] >= order[old]), z, -1e30), axis=-1)
            outs.append(jnp.einsum("bkgts,bksh->bktgh", p, v[:, :, old]))
        return jnp.concatenate(outs, axis=2).reshape(B, K, R, H), state

    rope = rotary.tables(config.rope, config.head_dim, positions[None], jnp.full((1,), T))
    states = (None,) * config.num_layers
    logits, _ = Transformer(config).apply({"params": params}, ids[None], rope, attend, states)
    return jnp.argmax(logits[0], axis=-1)


def line(name: str, tokens: int, results: list[Result]) -> str:
    """Return one row of the table: shares with an interval, then the values' share by depth."""
    value, exact, asked = sum(r.value for r in results), sum(r.exact for r in results), len(results)
    low, high = interval(value, asked)
    parts = [[r.value for r in results if min(DEPTHS - 1, int(r.depth * DEPTHS)) == part] for part in range(DEPTHS)]
    depths = " ".join(f"{sum(part)}/{len(part)}" for part in parts)
    return (
        f"{name:11s} {tokens:6d} tokens: value {value}/{asked} ({value / asked:.1%}, {low:.1%} to {high:.1%}), "
        f"whole answer {exact}/{asked} ({exact / asked:.1%}), by depth {depths}"
    )


def main(
    folder: Annotated[pathlib.Path, typer.Option(help="Exported model folder.")] = ASSETS / "razor-mini",
    documents: Annotated[int, typer.Option(min=1, help="Documents per length and family.")] = 25,
    facts: Annotated[int, typer.Option(min=3, help="Facts of a document.")] = 8,
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens, comma-separated.")] = "512,1024,2048",
    families: Annotated[str, typer.Option(help="Task families, comma-separated.")] = ",".join(FAMILIES),
) -> None:
    """Print dense accuracy of an exported razor-mini, one line a family and length."""
    if not (folder / "model.safetensors").is_file():
        raise typer.BadParameter(f"{folder} holds no model.safetensors; export one first", param_hint="--folder")
    sizes = lengths.split(",")
    if not all(size.strip().isdigit() for size in sizes):
        raise typer.BadParameter(f"{lengths!r} is not a list of token counts such as 512,1024", param_hint="--lengths")
    unknown = set(families.split(",")) - set(FAMILIES)
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)}: use some of {', '.join(FAMILIES)}", param_hint="--families")
    read = checkpoint.read(folder, "float32")
    config, params = read.config, read.weights
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokens in map(int, sizes):
        for family in families.split(","):
            results = family_results(config, params, tokenizer, family, tokens, documents, facts)
            typer.echo(line(family, tokens, results))
        right, scored = copy_accuracy(config, params, tokens)
        typer.echo(f"{'copy':11s} {tokens:6d} tokens: {right}/{scored} ({right / scored:.1%})")


if __name__ == "__main__":
    typer.run(main)

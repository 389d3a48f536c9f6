"""What the engine holds on its device, and its programs as methods that update it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..models.transformer import Block
from ..params import Params
from ..text.sampling import Sampling, rules, set_rule
from . import programs
from .pages import Layout
from .programs import BlockOutput, TopLogprobs

STOP_IDS = 16  # most stop ids per row that the device looks for; the host looks for all of them

Pages = Sequence[Sequence[int]]  # page ids per pool


class Device:
    """The cache, staging buffers and vocabulary state of all rows. The small numbers of rows are NumPy arrays.

    Attributes:
      tables: block table of each pool, int32 [slots, pages].
      rows: the numbers of all rows.
      chunk: prompt tokens per prefill step.
    """

    def __init__(self, params: Params, layout: Layout, staged_tokens: int, prefills: int, chunk: int, block: int):
        """Allocate an empty cache, and `prefills` staging buffers for `staged_tokens` tokens."""
        slots, vocabulary = layout.slots, params.config.vocab_size
        self._params, self._layout, self._block, self.chunk = params, layout, block, chunk
        self._ends = {name: weight for name, weight in params.weights.items() if not name.startswith("blocks_")}
        self._layers = layout.init()
        self._means = programs.init_means(self._layers, max(1, layout.prefixes))
        self._staging = [programs.init_staging(params, staged_tokens) for _ in range(prefills)]
        self._vocabulary = programs.Vocabulary.init(slots, vocabulary)
        self._all_allowed = jax.device_put(np.ones(vocabulary, bool))
        self._no_bias = jax.device_put(np.zeros(vocabulary, np.float32))
        self.tables = tuple(np.zeros((slots, width), np.int32) for width in layout.widths)
        sampling, greedy = rules(slots)
        integers = {name: np.zeros(slots, np.int32) for name in ("length", "window", "token", "count", "limit")}
        self.rows = programs.Rows(
            **integers,
            live=np.zeros(slots, bool),
            stop_ids=np.full((slots, STOP_IDS), -1, np.int32),
            seed=np.zeros(slots, np.uint32),
            sampling=sampling,
            greedy=greedy,
        )

    def run_every_program(self) -> None:
        """Run each program once without effect, so that all are compiled."""
        vocabulary = self._params.config.vocab_size
        self.prefill_chunk(0, 0, (), (), (0, 1, 1, 0, 1), score=False)
        self.write_segment(0, 0, (0, 1, 0, 0, 0))
        self.start_row(0, (), (), None, jax.device_put(np.zeros((1, vocabulary), np.float32)))
        self.decode_block(0, score=False)
        self.set_allowed(0, np.ones(vocabulary, bool))
        nothing: Pages = [()] * len(self.tables)
        self.copy_prefix(nothing, nothing, 0, 0, restore=False)
        jax.block_until_ready((self._layers, self._vocabulary))

    def set_row(
        self, slot: int, *, length: int, window: int, limit: int, stop_ids: Sequence[int], seed: int, sampling: Sampling
    ) -> None:
        """Make a row live that has read its prompt."""
        rows = self.rows
        rows.length[slot], rows.window[slot], rows.limit[slot] = length, window, limit
        rows.token[slot], rows.count[slot], rows.live[slot] = 0, 0, True
        rows.stop_ids[slot] = -1
        rows.stop_ids[slot, : len(stop_ids[:STOP_IDS])] = stop_ids[:STOP_IDS]
        rows.seed[slot] = seed
        set_rule(rows.sampling, rows.greedy, slot, sampling)

    def prefill_chunk(
        self,
        slot: int,
        staging: int,
        tokens: Sequence[int],
        targets: Sequence[int],
        numbers: Sequence[int],
        *,
        score: bool,
    ) -> tuple[jax.Array, TopLogprobs]:
        """Run a chunk of a segment through all layers; see `programs.layer_chunk` for `numbers`.

        Returns logits [1, V] after the chunk, and the log probabilities of the targets.
        """
        config, weights, staged = self._params.config, self._params.weights, self._staging[staging]
        row = (self._row_tables(slot), np.int32(slot), np.asarray(numbers, np.int32))
        x = programs.embed_chunk(config, self._ends, _padded(tokens, self.chunk, 0)[None])
        for index, layer in enumerate(self._layers):
            block = Block(config, config.first_like(index))
            x, staged[index] = programs.layer_chunk(
                block, weights[f"blocks_{index}"], x, layer, staged[index], *row, spec=self._layout.spec
            )
        return programs.chunk_logits(config, self._ends, x, _padded(targets, self.chunk, 0), row[2][4], np.bool_(score))

    def write_segment(self, slot: int, staging: int, numbers: Sequence[int]) -> None:
        """Write a staged segment to the pages of its row, with the numbers of its last chunk."""
        row = (self._row_tables(slot), np.int32(slot), np.asarray(numbers, np.int32))
        self._layers = tuple(
            programs.write_layer(layer, staged, *row, spec=self._layout.spec)
            for layer, staged in zip(self._layers, self._staging[staging], strict=True)
        )

    def start_row(
        self,
        slot: int,
        prompt: Sequence[int],
        bias: Sequence[tuple[int, float]],
        allowed: np.ndarray | None,
        logits: jax.Array,
    ) -> tuple[np.ndarray, bool, tuple[np.ndarray, ...]]:
        """Run `programs.start_row`. Return the tokens of the row, none if it failed; whether it failed; and the log
        probabilities."""
        seen = np.zeros(logits.shape[1], bool)
        seen[list(prompt)] = True
        biases: Any = self._no_bias
        if bias:
            biases = np.zeros(logits.shape[1], np.float32)
            for token, value in bias:
                biases[token] += value
        row = jax.tree.map(lambda x: x[slot : slot + 1].copy(), self.rows)
        self._vocabulary, token, failed, scores = programs.start_row(
            self._vocabulary,
            row,
            np.int32(slot),
            seen,
            biases,
            self._all_allowed if allowed is None else allowed,
            logits,
        )
        broken = bool(np.asarray(failed)[0])
        return np.asarray(token)[: int(not broken)], broken, tuple(np.asarray(x) for x in scores)

    def decode_block(self, steps: int, *, score: bool) -> BlockOutput:
        """Run `programs.decode_block`. Return its output as NumPy arrays."""
        self._layers, self._vocabulary, out = programs.decode_block(
            self._params,
            self._layers,
            self._vocabulary,
            self.rows,
            self.tables,
            np.int32(steps),
            np.bool_(score),
            spec=self._layout.spec,
            block=self._block,
        )
        return jax.tree.map(np.asarray, out)

    def set_allowed(self, slot: int, allowed: np.ndarray) -> None:
        """Run `programs.set_allowed`."""
        self._vocabulary = programs.set_allowed(self._vocabulary, np.int32(slot), allowed)

    def copy_prefix(self, sources: Pages, targets: Pages, slot: int, entry: int, *, restore: bool) -> None:
        """Run `programs.copy_prefix` on page ids."""
        widths, nowhere = self._layout.widths, np.iinfo(np.int32).max
        self._layers, self._means = programs.copy_prefix(
            self._layers,
            self._means,
            tuple(_padded(pages, width, 0) for pages, width in zip(sources, widths, strict=True)),
            tuple(_padded(pages, width, nowhere) for pages, width in zip(targets, widths, strict=True)),
            np.int32(slot),
            np.int32(entry),
            np.bool_(restore),
            spec=self._layout.spec,
        )

    def _row_tables(self, slot: int) -> tuple[np.ndarray, ...]:
        # Copies: a program may still read them when the slot gets other pages.
        return tuple(table[slot : slot + 1].copy() for table in self.tables)


def _padded(numbers: Sequence[int], length: int, rest: int) -> np.ndarray:
    """Return numbers as int32 [length], the end filled with `rest`."""
    out = np.full(length, rest, np.int32)
    out[: len(numbers)] = numbers
    return out


__all__: Sequence[str] = ("STOP_IDS", "Device")

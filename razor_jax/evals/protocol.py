"""How accuracy is measured: compress each document first, ask its questions afterwards, pair the settings.

    settings = [dense(params), CachedModel("Razor", params, params.razor)]
    table = run(settings, examples, max_new_tokens=32, resume=Path("needle.jsonl"))

In the headline column a document is prefilled and compressed alone, and each question goes to its own copy of that
cache. With `question_inside_prefill` (the second column, as in most published tables) document and question share one
prefill. Decoding is greedy, so weights, policy and text alone decide the answers.
"""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import compilation
from ..cache import KVCache
from ..config import HeadSplit, RazorConfig
from ..methods import CacheMethod
from ..params import Params, weights_fingerprint, with_heads
from ..text import prompts
from ..text.generate import generate, prefill
from ..text.policy import choose_policy
from ..text.result import KVReport, Result
from ..text.session import Session
from ..tokenizer.questions import split
from . import metrics
from .examples import Example, Form, Question, QuestionFormat
from .journal import Journal, key_of
from .table import Answered, SettingScores, Table

Progress = Callable[[str, int, int], None]
_QUESTION = "razor-jax-question"  # Placeholder for the question while the template is rendered.
_ROUND = 64  # the capacity of a cache is a multiple of this many tokens


@typing.runtime_checkable
class System(typing.Protocol):
    """Anything that answers examples: `CachedModel`, or an adapter of another library to compare with."""

    @property
    def name(self) -> str:
        """Name of its row in the table."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that decide the answers, without the name; they are part of a record's key."""
        ...

    def answer(
        self, examples: Sequence[Example], todo: Sequence[int], options: QuestionFormat
    ) -> Iterator[tuple[int, Answered]]:
        """Yield (i, answers to `examples[i]`) for each i of `todo`, in any order.

        Shapes (capacity, padding) must follow from all examples, so that a resumed run gives the same answers.
        """
        ...


def run(
    settings: Sequence[System],
    examples: Sequence[Example],
    *,
    question_inside_prefill: bool = False,
    form: Form | None = None,
    batch: int = 8,
    max_new_tokens: int = 32,
    stop: Sequence[str] = (),
    resume: Path | Journal | None = None,
    progress: Progress | None = None,
) -> Table:
    """Put the same questions to every setting, one setting after the other.

    Args:
      resume: records, or their file; answers recorded for the same setting, text and options are reused.
      progress: called with (setting, questions answered, all questions).

    Returns a `Table` of every question's score under every setting. Raises ValueError for bad input before computing.
    """
    options = QuestionFormat(question_inside_prefill, form, batch, max_new_tokens, tuple(stop))
    _check(settings, examples)
    journal = resume if isinstance(resume, Journal) else Journal(resume)
    rows = tuple(_score_setting(setting, examples, options, journal, progress) for setting in settings)
    return Table(tuple(examples), rows, options)


def _score_setting(
    setting: System, examples: Sequence[Example], options: QuestionFormat, journal: Journal, progress: Progress | None
) -> SettingScores:
    identity, asked = setting.identity(), dataclasses.asdict(options)
    keys = [key_of(system=identity, options=asked, example=dataclasses.asdict(example)) for example in examples]
    found = {i: Answered.from_dict(record) for i, key in enumerate(keys) if (record := journal.get(key)) is not None}
    todo = [i for i in range(len(examples)) if i not in found]
    total = sum(len(e.questions) for e in examples)

    def report() -> None:
        if progress is not None:
            progress(setting.name, sum(len(found[i].answers) for i in found), total)

    report()
    for index, answered in setting.answer(examples, todo, options):
        found[index] = answered
        journal.add(keys[index], {"setting": setting.name, **answered.to_dict()})
        report()
    compilation.make_room()
    return SettingScores.of(setting.name, examples, [found[i] for i in range(len(examples))])


def _check(settings: Sequence[System], examples: Sequence[Example]) -> None:
    if not settings or not examples:
        raise ValueError(f"{len(settings)} settings and {len(examples)} examples: give at least one of each")
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ValueError(f"settings are named {', '.join(names)}: give each its own name")
    for number, example in enumerate(examples):
        if not example.document.strip() or not example.questions:
            raise ValueError(f"example {number} has an empty document or no question")
        for question in example.questions:
            metrics.score(question.metric, "", question.answers)  # raises for an unknown metric or missing references


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A model with its head split under a cache policy (None: dense attention); one row of a table."""

    name: str
    params: Params
    razor: RazorConfig | CacheMethod | None

    def identity(self) -> dict[str, Any]:
        """Return weights, heads, policy, types and backend."""
        params, split_ = self.params, self.params.heads_or_all
        return {
            "weights": weights_fingerprint(params),
            "heads": [split_.retrieval, split_.scopes] if self.razor is not None else None,
            "razor": None if self.razor is None else dataclasses.asdict(self.razor),
            **({"method": self.razor.name} if isinstance(self.razor, CacheMethod) else {}),
            "dtype": str(params.dtype),
            "kernels": params.kernel_type,  # quantised weights have the fingerprint of those that they were made from
            "implementation": params.implementation,
            "backend": jax.default_backend(),
            "tokenizer": params.assets.digest if params.assets else None,
        }

    def answer(
        self, examples: Sequence[Example], todo: Sequence[int], options: QuestionFormat
    ) -> Iterator[tuple[int, Answered]]:
        """Prefill the documents in batches of one shape, then put their questions in batches, and yield the answers."""
        choose_policy(self.params, self.razor)
        texts = [encode_example(self.params, example, options.form) for example in examples]
        totals = [len(document) + max(map(len, asked)) + options.max_new_tokens for document, asked in texts]
        ask = self._ask_in_one if options.question_inside_prefill else self._ask_after
        for capacity, part in batches([len(document) for document, _ in texts], totals, todo, options.batch):
            with Stopwatch() as watch:
                answered = ask([texts[i] for i in part], capacity, options)
            for index, (answers, kv) in zip(part, answered, strict=True):
                yield index, Answered(answers, kv, len(texts[index][0]), watch.seconds / len(part))

    def _ask_after(
        self, texts: Sequence[EncodedExample], capacity: int, options: QuestionFormat
    ) -> list[tuple[tuple[str, ...], KVReport]]:
        """Compress the documents, then put each question to a copy of its document's row (headline column)."""
        rows = [texts[i % len(texts)][0] for i in range(options.batch)]
        cache = prefill(self.params, rows, razor=self.razor, capacity=capacity)
        report = KVReport.of(cache, self.params.heads_or_all)
        pairs = [(row, question) for row, (_, questions) in enumerate(texts) for question in questions]
        answers: list[list[str]] = [[] for _ in texts]
        for part in _pieces(pairs, options.batch):
            filled = [part[i % len(part)] for i in range(options.batch)]
            copies = rows_of(cache, np.asarray([row for row, _ in filled], np.int32))
            session = Session(
                self.params,
                [question for _, question in filled],
                max_new_tokens=options.max_new_tokens,
                stop=options.stop,
                cache=copies,
                owns_cache=True,
            )
            del copies  # the session owns and donates them
            for _ in session.run():
                pass
            for (row, _), result in zip(part, session.results(), strict=False):
                answers[row].append(result.text)
        return [(tuple(texts_), report.row(row)) for row, texts_ in enumerate(answers)]

    def _ask_in_one(
        self, texts: Sequence[EncodedExample], capacity: int, options: QuestionFormat
    ) -> list[tuple[tuple[str, ...], KVReport]]:
        """Prefill document and question together, for each question (second column)."""
        pairs = [(row, document + question) for row, (document, asked) in enumerate(texts) for question in asked]
        found: list[list[Result]] = [[] for _ in texts]
        for part in _pieces(pairs, options.batch):
            filled = [part[i % len(part)][1] for i in range(options.batch)]
            results = generate(
                self.params,
                filled,
                razor=self.razor,
                max_new_tokens=options.max_new_tokens,
                stop=options.stop,
                capacity=capacity,
            )
            for (row, _), result in zip(part, results, strict=False):
                found[row].append(result)
        return [(tuple(r.text for r in results), results[0].kv) for results in found]


def dense(params: Params, name: str = "dense") -> CachedModel:
    """Make the reference setting: dense attention from a bfloat16 cache, for weights of any type."""
    if params.dtype == np.dtype("bfloat16"):
        return CachedModel(name, params, None)
    every = HeadSplit.all(params.config.num_layers, params.config.num_kv_heads)
    return CachedModel(name, with_heads(params, every), RazorConfig(kv_dtype="bfloat16"))


EncodedExample = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


def encode_example(params: Params, example: Example, form: Form | None = None) -> EncodedExample:
    """Return the ids of the document and of each question; concatenated, they are the ids of one joint prefill.

    Raises ValueError without a tokenizer, and for form "chat" without a chat template.
    """
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("an evaluation on text needs a model with a tokenizer.json")
    form = form or ("chat" if assets.chat_template is not None else "plain")
    texts = [q.text for q in example.questions]
    if form == "raw":
        document, asked = assets.encode(example.document), [assets.encode(text, add_special=False) for text in texts]
    elif form == "user":
        written = assets.apply_chat([{"role": "user", "content": example.document + _QUESTION}])
        before, _, after = written.rpartition(_QUESTION)
        document = assets.encode(before, add_special=False)
        asked = [assets.encode(text + after, add_special=False) for text in texts]
    else:
        parts = split(assets, example.document, texts, chat=form == "chat")
        document = parts.document if form == "chat" else assets.encode(parts.document)
        asked = [q if form == "chat" else assets.encode(q, add_special=False) for q in parts.questions]
    prefixes = [assets.encode(q.prefix, add_special=False) if q.prefix else [] for q in example.questions]
    return tuple(document), tuple((*q, *prefix) for q, prefix in zip(asked, prefixes, strict=True))


class Stopwatch:
    """Wall-clock seconds of a block, compilation excluded."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started, self._compiled = time.perf_counter(), compilation.totals()[1]
        return self

    def __exit__(self, *error: Any) -> None:
        compiled = compilation.totals()[1] - self._compiled
        self.seconds = max(0.0, time.perf_counter() - self._started - compiled)


def batches(
    documents: Sequence[int], totals: Sequence[int], todo: Sequence[int], size: int
) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield (cache capacity, indices) of batches of `todo`; documents of one padded length share a capacity.

    `documents` are the document lengths of all examples, `totals` the tokens that their rows will need.
    """
    groups: dict[int, list[int]] = {}
    for index, tokens in enumerate(documents):
        groups.setdefault(prompts.prompt_bucket(tokens), []).append(index)
    pending = set(todo)
    for _, group in sorted(groups.items()):
        capacity = -(-max(totals[i] for i in group) // _ROUND) * _ROUND
        for part in _pieces([i for i in group if i in pending], size):
            yield capacity, part


@jax.jit
def rows_of(cache: KVCache, index: jax.Array) -> KVCache:
    """Copy the rows `index` int32 [B] of a cache; an index may repeat."""
    return jax.tree.map(lambda leaf: leaf[index], cache)


def _pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


__all__ = [
    "CachedModel",
    "Example",
    "Form",
    "Progress",
    "Question",
    "QuestionFormat",
    "Stopwatch",
    "System",
    "batches",
    "dense",
    "encode_example",
    "rows_of",
    "run",
]

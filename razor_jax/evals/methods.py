"""Cache methods at equal bytes: the same model, documents and questions under every method.

    razor-jax eval methods --model razor-mini --budget 0.1 --budget 0.2

Every method gets the bytes of the same share of a document's dense cache. A document is compressed before its questions
are known; the task `inside` puts each question into the prefill, the order that most methods were made for. The tasks
`long` and `agreement` decode after the document: what a method keeps of later tokens is part of its answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table as RichTable

from ..cache import make_spec
from ..config import RazorConfig
from ..heads import find_heads
from ..methods import (
    METHODS,
    CacheMethod,
    FastGen,
    HeadKV,
    LearnedMethod,
    RazorKVzip,
    by_name,
    load,
    stored_path,
    token_classes,
)
from ..methods.engine import bind
from ..params import Params
from ..text.generate import prefill
from ..text.session import Session
from . import agreement, families, long_generation, needle
from .conversation import Conversation
from .haystack import Haystack
from .journal import Journal, key_of
from .protocol import (
    CachedModel,
    EncodedExample,
    Example,
    Form,
    Progress,
    Stopwatch,
    System,
    batches,
    encode_example,
    run,
)
from .stats import Share
from .table import Table

logger = logging.getLogger(__name__)
_BLOCK = 256  # tokens of a copy in the head probe of HeadKV; it reads four

_INSIDE = 4  # questions of a document; each takes a prefill of its own

TaskName = Literal["needle", "needles", "several", "families", "conversation", "inside", "long", "agreement"]
Maker = Callable[[Params, needle.Grid, Haystack], list[Example]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A column of the table whose questions have right answers.

    Attributes:
      make: documents with their questions.
      answer_tokens: room for an answer.
      system: how a row answers.
      inside: whether a question goes into the prefill.
      kind: name in a question's meta; questions count by its values, each if dense attention can do it. "" for none.
      form: how questions are put; None as in `protocol.run`.
    """

    make: Maker
    answer_tokens: int = needle.ANSWER_TOKENS
    system: Callable[[CachedModel], System] = lambda row: row
    inside: bool = False
    kind: str = ""
    form: Callable[[Params], Form | None] = lambda params: None


def _needles(variant: needle.Variant) -> Maker:
    return lambda params, grid, haystack: needle.examples(params, variant, grid, haystack=haystack)


def _inside(params: Params, grid: needle.Grid, haystack: Haystack) -> list[Example]:
    """Return documents with facts, and questions about a few of them, evenly over the depth."""
    made, step = _needles("facts")(params, grid, haystack), -(-grid.facts // _INSIDE)
    return [dataclasses.replace(example, questions=example.questions[::step]) for example in made]


def _long(params: Params, grid: needle.Grid, haystack: Haystack) -> list[Example]:
    reply, half = later_tokens(grid), max(1, grid.facts // 2)
    kind = {"facts": half, "count": grid.documents, "seed": grid.seed, "haystack": haystack}
    return long_generation.examples(params, document=_document(grid), reply=reply, every=reply, **kind)


def _document(grid: needle.Grid) -> int:
    """Return the tokens of a document of `long` and `agreement`: about those of the other tasks."""
    return grid.lengths[0] - 2 * needle.ANSWER_TOKENS


def later_tokens(grid: needle.Grid) -> int:
    """Return the tokens that `long` and `agreement` decode after a document."""
    return max(2, grid.lengths[0] // 4)


TASKS: dict[TaskName, Task | None] = {
    "needle": Task(_needles("single")),
    "needles": Task(_needles("facts")),
    "several": Task(_needles("multi-query"), needle.answer_tokens("multi-query")),
    "families": Task(families.examples, families.ANSWER_TOKENS, kind="family", form=families.question_form),
    "conversation": Task(_needles("facts"), system=Conversation),
    "inside": Task(_inside, inside=True),
    "long": Task(_long, system=long_generation.LongReply, kind="where"),
    "agreement": None,  # no questions: the next tokens of a text, beside those of dense attention
}


def settings(params: Params, razor: RazorConfig, names: Sequence[str], budget: float | int) -> list[CachedModel]:
    """Return dense attention, Razor under its own policy, and the named methods at a budget; all without names.

    A method keeps its cache in the type of the weights, and so do dense attention and a policy that names no type.

    Raises ValueError for an unknown method or field, and for a named method that was not fitted to the model, or that
    the budget is too small for. Without names, such a method is left out.
    """
    rows = [CachedModel("dense", params, None), CachedModel("Razor", params, razor)]
    for name in names or METHODS:
        try:
            rows.append(CachedModel(row_name(name), params, make(params, name, budget)))
        except ValueError as error:
            if names:
                raise
            logger.info("left out: %s", error)
    return rows


def make(params: Params, name: str, budget: float | int) -> CacheMethod:
    """Return a method by its name, with what it needs to know of this model.

    Importance is the larger of the echo and the induction score of a short head probe.
    """
    method, known = by_name(name, budget), {}
    if isinstance(method, HeadKV):
        known["importance"] = tuple(tuple(map(float, layer)) for layer in find_heads(params, block=_BLOCK).best)
    if isinstance(method, FastGen):
        known["special"], known["punctuation"] = token_classes(params.assets)
    if isinstance(method, RazorKVzip) and params.heads is not None:
        known["retrieval"] = params.heads.retrieval
    if isinstance(method, LearnedMethod) and (path := stored_path(params, method.key)).is_file():
        known["learned"] = load(path)
    method = dataclasses.replace(method, **known)
    method.check_params(params)
    return method


def row_name(name: str) -> str:
    """Return the name of a method's row: as its paper calls it, with the fields that were given."""
    method, _, fields = name.partition(":")
    title = METHODS[method].name if method in METHODS else method
    return f"{title} ({fields})" if fields else title


def document_bytes(setting: CachedModel, tokens: int) -> int:
    """Return the bytes of a cache that holds a document of exactly `tokens` tokens and nothing else."""
    params, razor = setting.params, setting.razor
    split, dim = params.heads_or_all, params.config.head_dim
    if isinstance(razor, CacheMethod):
        return bind(razor, params, tokens).prompt_bytes(make_spec(split, dim, tokens, None, params.dtype), tokens)
    return make_spec(split, dim, tokens, razor, params.dtype).kv_bytes(1)


def learned_bytes(setting: CachedModel) -> int:
    """Return the bytes of a method's learned parts, which all rows and prompts share."""
    method = setting.razor
    return method.learned.nbytes if isinstance(method, LearnedMethod) and method.learned else 0


def read_bytes(setting: CachedModel, tokens: int) -> int | None:
    """Return what a step reads of a document, in bytes, where a method holds more than it reads; None otherwise."""
    method = setting.razor
    if not isinstance(method, CacheMethod) or method.kind != "selects":
        return None
    share = method.budget / tokens if isinstance(method.budget, int) else method.budget
    return round(min(1.0, share) * document_bytes(CachedModel("", setting.params, None), tokens))


def razor_share(
    params: Params, razor: RazorConfig, tasks: Sequence[TaskName], grid: needle.Grid, haystack: Haystack
) -> float:
    """Return the bytes of Razor's cache of the longest document, as a share of the dense cache's."""
    asked = [task for name in tasks if (task := TASKS[name]) is not None]
    made = [encode_example(params, e, task.form(params)) for task in asked for e in task.make(params, grid, haystack)]
    tokens = max((len(document) for document, _ in made), default=_document(grid))
    whole, ours = (document_bytes(CachedModel("", params, policy), tokens) for policy in (None, razor))
    return ours / whole


def seconds(
    setting: CachedModel, texts: Sequence[EncodedExample], *, batch: int, new_tokens: int, records: Journal
) -> tuple[float, float]:
    """Return seconds of prefill per document and of a decode step of `batch` rows, those of the second of two runs.

    Shapes are those of the task that asked these questions. `records` may have the figures of the same setting.
    """
    key = key_of(system=setting.identity(), second_run=texts, batch=batch, new_tokens=new_tokens)
    if (record := records.get(key)) is not None:
        return record["prefill_seconds"], record["decode_seconds"]
    totals = [len(document) + max(map(len, asked)) + new_tokens for document, asked in texts]
    lengths = [len(document) for document, _ in texts]
    capacity, part = next(batches(lengths, totals, range(len(texts)), batch))
    documents, questions = zip(*(texts[part[i % len(part)]] for i in range(batch)), strict=True)
    asked = [each[0] for each in questions]
    for _ in range(2):  # The first loads its programs.
        with Stopwatch() as watch:
            cache = prefill(setting.params, documents, razor=setting.razor, capacity=capacity)
        session = Session(setting.params, asked, max_new_tokens=new_tokens, cache=cache, owns_cache=True)
        for _ in session.run():
            pass
        results = session.results()
        del cache, session  # before the next prefill
    steps = max(len(result.tokens) for result in results) - 1
    found = watch.seconds / batch, results[0].timings.decode_seconds / max(1, steps)
    taken = {"batch": batch, "new_tokens": new_tokens, "prefill_seconds": found[0], "decode_seconds": found[1]}
    records.add(key, {"setting": setting.name, **taken})
    return found


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results of several tasks with the same rows.

    Attributes:
      tables: one per task with questions; of `families` and `long`, of the kinds that dense attention can do.
      shares: per task, the score of each row; of `agreement`, tokens that dense attention would also have chosen.
      unfit: per task, the kinds of questions that dense attention cannot do.
      tokens: tokens of the longest document.
      bytes: per row, those of its cache of such a document.
      learned: per row, bytes of its learned parts, beside the cache.
      reads: of rows that hold more than a step reads, the bytes that it reads. They are no rivals of the others.
      times: per row, seconds of prefill per document, and of a decode step of a whole batch.
    """

    tables: dict[TaskName, Table]
    shares: dict[TaskName, dict[str, Share]]
    unfit: dict[TaskName, tuple[str, ...]]
    tokens: int
    bytes: dict[str, int]
    learned: dict[str, int]
    reads: dict[str, int]
    times: dict[str, tuple[float, float]]

    def render(self, title: str) -> RichTable:
        """Return shares of right answers by task, bytes and times, for the terminal."""
        unfit = [f"{name}: {', '.join(kinds)}" for name, kinds in self.unfit.items() if kinds]
        caption = f"not counted, because dense attention fails too: {'; '.join(unfit)}" if unfit else None
        table = RichTable(title=title, box=box.SIMPLE, title_justify="left", caption=caption)
        for name in ("method", *self.shares, "bytes", "of dense", "learned", "prefill s", "ms a step"):
            table.add_column(name, justify="left" if name == "method" else "right")
        whole = next(iter(self.bytes.values()))
        for name, size in self.bytes.items():
            right = (f"{each[name].share:.1%}" for each in self.shares.values())
            prefill, decode = self.times[name]
            learned = f"{self.learned[name]:,}" if self.learned[name] else "–"
            held = f"holds {size:,}, reads {self.reads[name]:,}" if name in self.reads else f"{size:,}"
            figures = (held, f"{size / whole:.1%}", learned, f"{prefill:.2f}", f"{1000 * decode:.1f}")
            table.add_row(name, *right, *figures)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON: a summary of each row, and the tables with paired intervals against dense."""
        rows = [
            {
                "method": name,
                "bytes": size,
                "learned_bytes": self.learned[name],
                "read_bytes": self.reads.get(name),
                "prefill_seconds": self.times[name][0],
                "decode_seconds": self.times[name][1],
                "right": {task: each[name]._asdict() for task, each in self.shares.items()},
                "minus_razor": {task: table.difference(name, "Razor")._asdict() for task, table in self.tables.items()},
            }
            for name, size in self.bytes.items()
        ]
        tables = [{"task": task, **table.to_dict()} for task, table in self.tables.items()]
        return {"document_tokens": self.tokens, "unfit": self.unfit, "rows": rows, "tables": tables}


def compare(
    rows: Sequence[CachedModel],
    tasks: Sequence[TaskName],
    grid: needle.Grid,
    haystack: Haystack,
    *,
    batch: int = 8,
    records: Journal | None = None,
    progress: Callable[[str], contextlib.AbstractContextManager[Progress]] | None = None,
) -> Comparison:
    """Ask every row the questions of every task.

    Args:
      rows: dense first.
      grid: documents of one length.
      records: answers and times of earlier calls; what they have is not computed again.
      progress: called with a task's name, enters what `protocol.run` calls.
    """
    records = records or Journal(None)
    params = rows[0].params
    unfit: dict[TaskName, tuple[str, ...]] = {}
    tables: dict[TaskName, Table] = {}
    shares: dict[TaskName, dict[str, Share]] = {}
    timed: list[tuple[list[EncodedExample], int]] = []
    for name in tasks:
        with progress(name) if progress else contextlib.nullcontext() as advance:
            task = TASKS[name]
            if task is None:
                shares[name] = _agreement(rows, grid, haystack, batch, records, advance)
                continue
            made, form = task.make(params, grid, haystack), task.form(params)
            tables[name] = run(
                [task.system(row) for row in rows],
                made,
                form=form,
                question_inside_prefill=task.inside,
                max_new_tokens=task.answer_tokens,
                batch=batch,
                resume=records,
                progress=advance,
            )
        if task.kind:
            tables[name], unfit[name] = families.fit(tables[name], task.kind)
        shares[name] = {row.name: row.score for row in tables[name].rows}
        timed.append(([encode_example(params, example, form) for example in made], task.answer_tokens))
    if not timed:
        made = _needles("facts")(params, grid, haystack)
        timed.append(([encode_example(params, example) for example in made], needle.ANSWER_TOKENS))
    longest = max(len(document) for texts, _ in timed for document, _ in texts)
    texts, new_tokens = timed[0]
    times = {row.name: seconds(row, texts, batch=batch, new_tokens=new_tokens, records=records) for row in rows}
    sizes = {row.name: document_bytes(row, longest) for row in rows}
    learned = {row.name: learned_bytes(row) for row in rows}
    reads = {row.name: size for row in rows if (size := read_bytes(row, longest)) is not None}
    return Comparison(tables, shares, unfit, longest, sizes, learned, reads, times)


def _agreement(
    rows: Sequence[CachedModel],
    grid: needle.Grid,
    haystack: Haystack,
    batch: int,
    records: Journal,
    progress: Progress | None,
) -> dict[str, Share]:
    """Return the share of the tokens after a document that each row would choose as dense attention does."""
    passages = agreement.text_passages(
        rows[0].params,
        haystack,
        prompt=_document(grid),
        following=later_tokens(grid),
        count=grid.documents,
        seed=grid.seed,
    )
    found = agreement.run(rows, passages, batch=batch, resume=records, progress=progress)
    # A row that drops nothing has no token that counts, and agrees by construction.
    same = Share(1.0, 1.0, 1.0)
    return {rows[0].name: same, **{row.name: row.agreement or same for row in found}}

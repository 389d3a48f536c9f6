"""One growing conversation about a document: the cache, with the model's answers, goes from turn to turn.

`protocol.run` with a plain `CachedModel` asks differently: each question goes to its own copy of the document's cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..params import Params
from ..text.generate import prefill
from ..text.policy import choose_policy
from ..text.result import KVReport
from ..text.session import Session
from ..tokenizer.assets import Assets
from .protocol import CachedModel, EncodedExample, Example, Form, QuestionFormat, Stopwatch, batches, encode_example
from .table import Answered

_MARK = "razor-jax-turn"  # With a number: placeholder for a turn's text while the template is rendered.


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A cached model that answers the questions of an example as the turns of one conversation."""

    setting: CachedModel

    @property
    def name(self) -> str:
        return self.setting.name

    def identity(self) -> dict[str, Any]:
        """Return the identity of the cached model, marked as a conversation."""
        return {**self.setting.identity(), "conversation": True}

    def answer(
        self, examples: Sequence[Example], todo: Sequence[int], options: QuestionFormat
    ) -> Iterator[tuple[int, Answered]]:
        """Answer as `System.answer`. Raise ValueError for questions inside the prefill: turns come after it."""
        if options.question_inside_prefill:
            raise ValueError("the turns of a conversation come after the prefill: leave question_inside_prefill out")
        params = self.setting.params
        choose_policy(params, self.setting.razor)
        texts = [encode_conversation(params, example, options.form) for example in examples]
        totals = [len(d) + sum(len(q) + options.max_new_tokens for q in asked) for d, asked in texts]
        for capacity, part in batches([len(d) for d, _ in texts], totals, todo, options.batch):
            with Stopwatch() as watch:
                answers, report = self._talk([texts[i] for i in part], capacity, options)
            for row, index in enumerate(part):
                yield index, Answered(answers[row], report.row(row), len(texts[index][0]), watch.seconds / len(part))

    def _talk(
        self, texts: Sequence[EncodedExample], capacity: int, options: QuestionFormat
    ) -> tuple[list[tuple[str, ...]], KVReport]:
        """Return the answers of each conversation of a batch, and the report on the cache before the first turn."""
        params = self.setting.params
        rows = [texts[i % len(texts)] for i in range(options.batch)]
        cache = prefill(params, [document for document, _ in rows], razor=self.setting.razor, capacity=capacity)
        report = KVReport.of(cache, params.heads_or_all)
        answers: list[list[str]] = [[] for _ in rows]
        last: list[list[int]] = [[] for _ in rows]
        for turn in range(max(len(asked) for _, asked in rows)):
            # A finished conversation repeats its last question, so that the batch keeps its shape.
            asked = [list(questions[min(turn, len(questions) - 1)]) for _, questions in rows]
            spoken = [
                before + skip_repeated_token(before, question) for before, question in zip(last, asked, strict=True)
            ]
            session = Session(
                params, spoken, max_new_tokens=options.max_new_tokens, stop=options.stop, cache=cache, owns_cache=True
            )
            for _ in session.run():
                pass
            results, cache = session.results(), session.cache
            # The newest token is not in the cache yet.
            last = [[result.tokens[-1]] for result in results]
            for row, result in enumerate(results):
                answers[row].append(result.text)
        return [tuple(a[: len(q)]) for a, (_, q) in zip(answers, texts, strict=False)], report


def skip_repeated_token(last: Sequence[int], turn: list[int]) -> list[int]:
    """Return the ids of a turn without its first token if that repeats the last token of the answer before.

    Templates open a turn with the end-of-turn token, which the model may already have generated.
    """
    return turn[1:] if last and turn[0] == last[-1] else turn


def encode_conversation(params: Params, example: Example, form: Form | None = None) -> EncodedExample:
    """Return the ids of the document and of each turn.

    The first turn is that of `encode_example`. Later ones begin with what the template writes after an answer.
    """
    document, asked = encode_example(params, example, form)
    assets = params.assets
    assert assets is not None
    templated = form in ("chat", "user") or (form is None and assets.chat_template is not None)
    if not templated:
        return document, asked
    between, follows = render_turn_separators(assets, example.document)
    later = [
        (*assets.encode(between + q.text.strip() + follows, add_special=False), *_ids(assets, q.prefix))
        for q in example.questions[1:]
    ]
    return document, (asked[0], *later)


def render_turn_separators(assets: Assets, document: str) -> tuple[str, str]:
    """Return the template's text from an answer to the next question, and from that question to its answer."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"{_MARK}-{number}"} for number, role in enumerate(roles)]
    try:
        text = assets.apply_chat([{"role": "system", "content": document}, *messages])
    except ValueError:  # a template without system messages
        text = assets.apply_chat(messages)
    _, _, rest = text.partition(f"{_MARK}-1")
    between, _, follows = rest.partition(f"{_MARK}-2")
    return between, follows


def _ids(assets: Assets, text: str) -> list[int]:
    return assets.encode(text, add_special=False) if text else []

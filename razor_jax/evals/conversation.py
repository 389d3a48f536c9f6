"""One growing conversation about a document: the cache, with the model's answers, goes from turn to turn.

The other way to ask many questions, a copy of the document's cache for each, is what `protocol.run` does by itself.
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
    """A setting that is asked an example's questions one after the other, in their order."""

    setting: CachedModel

    @property
    def name(self) -> str:
        return self.setting.name

    def identity(self) -> dict[str, Any]:
        """Return the setting's, marked."""
        return {**self.setting.identity(), "conversation": True}

    def answer(
        self, examples: Sequence[Example], todo: Sequence[int], options: QuestionFormat
    ) -> Iterator[tuple[int, Answered]]:
        """Answer as `System.answer`. Raise ValueError for questions inside the prefill: a conversation continues after
        it.
        """
        if options.question_inside_prefill:
            raise ValueError("a conversation goes on after the prefill: leave question_inside_prefill out")
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
        """Return all turns of a batch of conversations: answers of each, and what was dropped before the first turn."""
        params = self.setting.params
        rows = [texts[i % len(texts)] for i in range(options.batch)]
        cache = prefill(params, [document for document, _ in rows], razor=self.setting.razor, capacity=capacity)
        report = KVReport.of(cache, params.heads_or_all)
        answers: list[list[str]] = [[] for _ in rows]
        last: list[list[int]] = [[] for _ in rows]
        for turn in range(max(len(asked) for _, asked in rows)):
            # A conversation that is over repeats its last question: batch and programs stay the same.
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
    """Return a turn's ids after the answer's last token, which may be the end-of-turn token that the turn opens
    with.
    """
    return turn[1:] if last and turn[0] == last[-1] else turn


def encode_conversation(params: Params, example: Example, form: Form | None = None) -> EncodedExample:
    """Return ids of the document, and of each turn: the first as `cut` has it, later ones with what ends the answer
    before.
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
    """Return what the template writes between an answer and the next question, and between that and its answer."""
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

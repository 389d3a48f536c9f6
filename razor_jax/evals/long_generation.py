"""Long generation: does the model still know its document, and its own words, after thousands of new tokens?

A small model that generates freely soon repeats itself, and then nothing is left to score. So the reply is given: a
document with facts is prefilled, then a long reply with further facts is decoded token by token. Each token evicts one
from the ring of every windowed head, as in generation. At intervals, a copy of the cache is asked for the facts of the
document and for those of the reply so far.

For free-running output, `agreement.greedy_passages` generates as many tokens, which are scored token by token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..cache import KVCache
from ..needles.facts import Fact, make_facts
from ..params import Params
from ..text import prompts
from ..text.generate import prefill
from ..text.policy import choose_policy
from ..text.result import KVReport
from ..text.session import Session
from ..text.teacher_forcing import force_jit
from .conversation import render_turn_separators
from .haystack import Haystack, counter
from .needle import plant
from .protocol import (
    CachedModel,
    EncodedExample,
    Example,
    Question,
    QuestionFormat,
    Stopwatch,
    batches,
    encode_example,
    rows_of,
)
from .table import Answered

_REQUEST = "Continue."


def examples(
    params: Params,
    *,
    document: int,
    reply: int,
    every: int,
    facts: int = 8,
    count: int = 8,
    seed: int = 1,
    haystack: Haystack | None = None,
) -> list[Example]:
    """Make `count` documents of `document` tokens and replies of `reply` tokens, each with `facts` facts.

    Every `every` tokens of the reply, all facts so far are asked for. The meta of a question has `written`, the tokens
    of the reply when it is asked; `where`, "document" or "reply"; and `distance`, the tokens from fact to question.

    Raises ValueError for a reply shorter than `every`, no fact, or facts that do not fit.
    """
    if not 1 <= every <= reply or facts < 1:
        raise ValueError(f"reply={reply}, every={every}, facts={facts}: use 1 <= every <= reply, and at least one fact")
    haystack, size = haystack or Haystack.load(), counter(params)
    made = []
    for index in range(count):
        rng = np.random.default_rng([seed, document, reply, index])
        known = make_facts(rng, 2 * facts, "held_out")
        depths = (np.arange(facts) + rng.random(facts)) / facts
        texts = []
        for tokens, part in ((document, known[:facts]), (reply, known[facts:])):
            room = tokens - sum(size("\n" + fact.sentence) for fact in part)
            if room < 1:
                raise ValueError(f"{facts} facts do not fit in {tokens} tokens: use more tokens or fewer facts")
            texts.append(plant(haystack.lines(rng), [fact.sentence for fact in part], depths, size, room))
        ends = [size(texts[1][: texts[1].index(fact.sentence) + len(fact.sentence)]) for fact in known[facts:]]
        starts = [size(texts[0][: texts[0].index(fact.sentence)]) for fact in known[:facts]]
        whole, questions = size(texts[0]), []
        for written in range(every, reply + 1, every):
            for fact, start in zip(known[:facts], starts, strict=True):
                questions.append(_question(fact, written, "document", whole - start + written))
            for fact, end in zip(known[facts:], ends, strict=True):
                if end <= written:
                    questions.append(_question(fact, written, "reply", written - end))
        made.append(Example(texts[0], tuple(questions), {"reply": texts[1]}))
    return made


def _question(fact: Fact, written: int, where: str, distance: int) -> Question:
    meta = {"written": written, "where": where, "distance": distance}
    return Question(fact.question, (fact.value,), meta=meta)


@dataclasses.dataclass(frozen=True)
class LongReply:
    """A cached model that decodes a given reply token by token before it is asked."""

    setting: CachedModel

    @property
    def name(self) -> str:
        return self.setting.name

    def identity(self) -> dict[str, Any]:
        """Return the identity of the cached model, marked as a long reply."""
        return {**self.setting.identity(), "long_reply": True}

    def answer(
        self, examples: Sequence[Example], todo: Sequence[int], options: QuestionFormat
    ) -> Iterator[tuple[int, Answered]]:
        """Answer as `System.answer`; `kv` reports on the cache after the whole reply."""
        params = self.setting.params
        choose_policy(params, self.setting.razor)
        texts = [self._encode(example, options) for example in examples]
        longest = [len(d) + len(r) + max(map(len, asked)) + options.max_new_tokens for (d, asked), r in texts]
        for capacity, part in batches([len(d) for (d, _), _ in texts], longest, todo, options.batch):
            with Stopwatch() as watch:
                answers, report = self._write([examples[i] for i in part], [texts[i] for i in part], capacity, options)
            for row, index in enumerate(part):
                document = len(texts[index][0][0])
                yield index, Answered(answers[row], report.row(row), document, watch.seconds / len(part))

    def _encode(self, example: Example, options: QuestionFormat) -> tuple[EncodedExample, list[int]]:
        """Return the ids of document and request with those of each question, and the ids of the reply."""
        assets = self.setting.params.assets
        request = Example(example.document, (Question(_REQUEST, ("",)),))
        document, (asked,) = encode_example(self.setting.params, request, options.form)
        assert assets is not None
        reply = assets.encode(example.meta["reply"], add_special=False)
        if options.form in ("chat", "user") or (options.form is None and assets.chat_template is not None):
            between, follows = render_turn_separators(assets, example.document)
        else:
            between, follows = "\n\nQuestion: ", "\nAnswer:"
        questions = [assets.encode(f"{between}{q.text}{follows}", add_special=False) for q in example.questions]
        return ((*document, *asked), tuple(map(tuple, questions))), reply

    def _write(
        self,
        part: Sequence[Example],
        texts: Sequence[tuple[EncodedExample, list[int]]],
        capacity: int,
        options: QuestionFormat,
    ) -> tuple[list[tuple[str, ...]], KVReport]:
        """Decode the replies of a batch, asking on the way, and return the answers of each document."""
        params = self.setting.params
        filled = [texts[i % len(texts)] for i in range(options.batch)]
        cache = prefill(params, [document for (document, _), _ in filled], razor=self.setting.razor, capacity=capacity)
        stops = sorted({q.meta["written"] for example in part for q in example.questions})
        answers: list[dict[int, str]] = [{} for _ in part]
        for start, stop in zip([0, *stops], stops, strict=False):
            cache = _decode(params, cache, [reply[start:stop] for _, reply in filled], stop - start)
            pairs = [
                (row, number)
                for row, example in enumerate(part)
                for number, question in enumerate(example.questions)
                if question.meta["written"] == stop
            ]
            for first in range(0, len(pairs), options.batch):
                some = pairs[first : first + options.batch]
                for (row, number), text in zip(some, self._ask(cache, some, texts, options), strict=False):
                    answers[row][number] = text
        report = KVReport.of(cache, params.heads_or_all)
        return [tuple(found[number] for number in sorted(found)) for found in answers], report

    def _ask(self, cache: KVCache, pairs: Sequence[tuple[int, int]], texts: Any, options: QuestionFormat) -> list[str]:
        """Put each (row, question) pair to a copy of its row of the cache, and return the answers."""
        filled = [pairs[i % len(pairs)] for i in range(options.batch)]
        session = Session(
            self.setting.params,
            [texts[row][0][1][number] for row, number in filled],
            max_new_tokens=options.max_new_tokens,
            stop=options.stop,
            cache=rows_of(cache, np.asarray([row for row, _ in filled], np.int32)),
            owns_cache=True,
        )
        for _ in session.run():
            pass
        return [result.text for result in session.results()]


def _decode(params: Params, cache: KVCache, replies: Sequence[Sequence[int]], size: int) -> KVCache:
    """Write each row's tokens, one per step. Raises FloatingPointError if a logit is not finite."""
    tokens, lengths = prompts.pad(replies, size)
    found, cache = force_jit(params, cache, tokens, tokens, lengths)
    live = np.arange(size) < lengths[:, None]
    if not np.asarray(jax.device_get(found.finite))[live].all():
        raise FloatingPointError("a logit of the reply is NaN or infinite: the state of the cache is broken")
    return cache

"""Questions and paragraphs of SQuAD and HotpotQA, from JSON files of the user."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Item:
    """A question, its right answers, the paragraphs that it is about, and others of the same article (ids)."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pool:
    """All questions of a file, and its distinct paragraphs."""

    items: tuple[Item, ...]
    paragraphs: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Pool:
        """Read the file of SQuAD ({"data": [{"paragraphs": …}]}) or HotpotQA ([{"question", "answer", "context"}]).

        Raises FileNotFoundError, or ValueError that names the file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            ids: dict[str, int] = {}
            squad = isinstance(content, dict)
            items = tuple(_squad(content["data"], ids) if squad else _hotpot(content, ids))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not SQuAD's or HotpotQA's JSON ({type(error).__name__}: {error}): give dev-v2.0.json or "
                "hotpot_dev_distractor_v1.json"
            ) from error
        if not items:
            raise ValueError(f"{path} holds no question that has an answer")
        return cls(items, tuple(ids))

    def around(self, rng: np.random.Generator, item: Item, others: int) -> list[str]:
        """Return the item's paragraphs among `others` more, its own article's first; all in random order.

        Where the file has no more, paragraphs repeat.
        """
        taken = {*item.needed, *item.near}
        near = [int(i) for i in rng.permutation(np.asarray(item.near, int))]
        rest = [int(i) for i in rng.permutation(len(self.paragraphs)) if int(i) not in taken]
        pool = near + rest or list(item.needed)
        chosen = [*item.needed, *(pool[i % len(pool)] for i in range(others))]
        return [self.paragraphs[chosen[i]] for i in rng.permutation(len(chosen))]


def _squad(articles: Any, ids: dict[str, int]) -> Iterator[Item]:
    for article in articles:
        own = [ids.setdefault(paragraph["context"], len(ids)) for paragraph in article["paragraphs"]]
        for here, paragraph in zip(own, article["paragraphs"], strict=True):
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible", False):
                    yield Item(asked["question"], answers, (here,), tuple(i for i in own if i != here))


def _hotpot(rows: Any, ids: dict[str, int]) -> Iterator[Item]:
    for row in rows:
        texts = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
        needed = tuple(dict.fromkeys(ids.setdefault(text, len(ids)) for text in texts))
        yield Item(row["question"], (row["answer"],), needed)

"""Answer a file of prompts in order, batch by batch, into a file of answers; a killed run resumes where it stopped.

Prompts and answers are JSON lines: {"id": …, "prompt": … or "messages": …, "max_new_tokens": …} and {"key": …,
"id": …, "text": …, "tokens": …, "finish_reason": …}. `key` is a hash of everything that decides the answer. A prompt
that the model cannot take, or whose own limit does not fit into memory, gets {"key": …, "id": …, "line": …, "error":
…}, and all others are answered. Only process 0 reads and writes the files. Answers are on disk before the next batch
begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.loader import fold
from ..config import check_int
from ..evals.journal import Journal, key_of
from ..launch import worker
from ..text.result import Result
from .messages import broadcast_from_process_0

# (prompts, max_new_tokens, batch number) -> one result per prompt, or why that prompt has none
Answer = Callable[[list[Any], int, int], Sequence[Result | str]]
Progress = Callable[[int, int], None]

_FIELDS = ("id", "prompt", "messages", "max_new_tokens")


def _alone(answer: Answer, task: Mapping[str, Any], row: int, batch: int) -> Result | str:
    """Return what `answer` gives for the prompt of a row in a batch without the others, or why it has no room."""
    try:
        return answer(batch * [task["prompts"][row]], task["max_new_tokens"], task["number"])[row]
    except MemoryError as error:
        return str(error)


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of the prompt file."""

    id: str | int
    prompt: Any
    max_new_tokens: int
    line: int  # in the file, from 1


def serve(
    prompts: Path,
    output: Path,
    answer: Answer,
    *,
    batch: int,
    max_new_tokens: int,
    run: Mapping[str, Any],
    progress: Progress = lambda done, total: None,
) -> int:
    """Answer the prompts that have no answer yet and return their number. Every process calls this.

    Args:
      answer: called on every process, always with `batch` prompts, so that it compiles once.
      max_new_tokens: limit for lines without one.
      run: JSON values that decide the answers together with the prompt: model, policy, sampling.
      progress: called with the numbers of finished prompts and of all prompts.

    Raises ValueError, on every process and before anything is written, for an invalid line, and for an output that
    has answers of another run or that another run is writing.
    """
    work: list[_Work] = []  # filled on process 0 only
    with contextlib.ExitStack() as stack:

        def begin() -> list[int]:
            items = read(prompts, max_new_tokens)
            stack.enter_context(_locked(output))
            work.append(_Work(items, output, batch, run))
            return work[0].counts

        done, total = broadcast_from_process_0(begin)
        before = done
        progress(done, total)
        while (task := broadcast_from_process_0(lambda: work[0].task())) is not None:
            given = task["prompts"]
            try:
                results = answer(given + given[-1:] * (batch - len(given)), task["max_new_tokens"], task["number"])
            except MemoryError as error:
                if task["max_new_tokens"] == max_new_tokens:  # the run's own limit, not that of a line
                    raise
                # A long one may be to blame. Each keeps its row, so that it is drawn as in the batch.
                results = [_alone(answer, task, row, batch) if batch > 1 else str(error) for row in range(len(given))]
            except (ValueError, TypeError) as error:
                raise ValueError(f"prompts {task['ids'][0]!r} to {task['ids'][-1]!r}: {error}") from error
            done, total = broadcast_from_process_0(lambda results=results: work[0].keep(results))
            worker.notify_launcher(finished=task["ids"][-1])
            progress(done, total)
    return done - before


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Lock the file against other runs. The lock ends with the process, even if it is killed."""
    import fcntl  # imported here: Windows lacks it, and every command imports this file

    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{output} is being written by another run: wait until it ends, or name another output"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


class _Work:
    """The batches, and the answers on disk; exists on process 0 only.

    Batches are cut from the whole file, including finished prompts, so which prompts share a batch does not depend on
    when a run was killed.
    """

    def __init__(self, items: list[Item], output: Path, batch: int, run: Mapping[str, Any]):
        self._batches = [
            list(part)
            for _, same in itertools.groupby(items, key=lambda item: item.max_new_tokens)
            for part in _parts(list(same), batch)
        ]
        self._run = run
        self._total = len(items)
        self._journal = Journal(output)
        finished = [self._journal.get(self._key(item)) is not None for item in items]
        self._done = sum(finished)
        lines = output.read_bytes().count(b"\n")
        if lines != self._done:
            raise ValueError(
                f"{output} has {lines} answers, but {self._done} of them are to these prompts by this model with these "
                "options: name another output, or use the prompts, model and options that it was started with"
            )
        if not all(finished[: self._done]):
            raise ValueError(f"{output} lacks answers to some of the first prompts: name another output")
        self._at = 0

    @property
    def counts(self) -> list[int]:
        return [self._done, self._total]

    def task(self) -> dict[str, Any] | None:
        """Return the next batch with a missing answer, None after the last."""
        while self._at < len(self._batches):
            items = self._batches[self._at]
            if any(self._missing(item) for item in items):
                return {
                    "number": self._at,
                    "ids": [item.id for item in items],
                    "prompts": [item.prompt for item in items],
                    "max_new_tokens": items[0].max_new_tokens,
                }
            self._at += 1
        return None

    def keep(self, results: Sequence[Result | str]) -> list[int]:
        """Write the missing answers of the current batch and return the counts."""
        for item, result in zip(self._batches[self._at], results, strict=False):  # a short batch was padded
            if self._missing(item):
                if isinstance(result, str):
                    answer = {"line": item.line, "error": result}
                else:
                    answer = {"text": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason}
                self._journal.add(self._key(item), {"id": item.id, **answer})
                self._done += 1
        return self.counts

    def _missing(self, item: Item) -> bool:
        return self._journal.get(self._key(item)) is None

    def _key(self, item: Item) -> str:
        asked = dataclasses.asdict(item)
        del asked["line"]  # a blank line before a prompt does not change its answer
        return key_of(**asked, run=dict(self._run))


def read(path: Path, max_new_tokens: int) -> list[Item]:
    """Return the prompts of a file. Raises ValueError with each wrong line, its problem and what is allowed."""
    items: dict[str | int, Item] = {}
    wrong: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _item(_parsed(line), max_new_tokens, number)
            if item.id in items:
                raise ValueError(f"id {item.id!r} is also in an earlier line: give each prompt its own id")
            items[item.id] = item
        except ValueError as error:
            wrong.append(f"{path}, line {number}: {error}")
    if wrong:
        raise ValueError(fold(wrong, "\n"))
    if not items:
        raise ValueError(f"{path} has no prompts")
    return list(items.values())


def _parsed(line: bytes) -> Any:
    try:
        data = json.loads(line)
        json.dumps(data, ensure_ascii=False).encode()  # refuses half of a surrogate pair
        return data
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"not a line of JSON ({reason})") from None


def _item(data: Any, max_new_tokens: int, line: int) -> Item:
    if not isinstance(data, dict) or type(data.get("id")) not in (str, int):
        raise ValueError('must be an object with an "id" that is a string or a whole number')
    for name in data:
        if name not in _FIELDS:
            raise ValueError(f"unknown field {name!r}: allowed are {', '.join(_FIELDS)}")
    if ("prompt" in data) == ("messages" in data):
        raise ValueError('give either "prompt" or "messages"')
    limit = check_int('"max_new_tokens"', data.get("max_new_tokens", max_new_tokens), 1)
    return Item(data["id"], _text(data["prompt"]) if "prompt" in data else _chat(data["messages"]), limit, line)


def _text(prompt: Any) -> str | list[int]:
    ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if not prompt or not (ids or isinstance(prompt, str)):
        raise ValueError(f'"prompt" is {_short(prompt)}: must be non-empty text or a non-empty list of token ids')
    return prompt


def _chat(messages: Any) -> list[dict[str, Any]]:
    sound = isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in messages
    )
    if not messages or not sound:
        raise ValueError(
            f'"messages" is {_short(messages)}: must be a non-empty list of {{"role": "user", "content": "…"}}'
        )
    return messages


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _parts(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]

"""LongBench v1, LongBench-E and v2 from their published files: prompts, truncation, scores.

Download the data yourself: https://huggingface.co/datasets/THUDM/LongBench (data.zip) and …/LongBench-v2 (data.json).
A prompt is split after the context, so that the context is compressed before instructions and question are known. The
second column of `protocol` uses the published single prompt. Answers are greedy, also in v2, whose script samples at
temperature 0.1.

    for name, records in read([folder]).items():
        table = run(settings, examples(params, name, records), **options(params, name))
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import check_int
from ..params import Params
from ..tokenizer.assets import Assets
from . import longbench_metrics
from .protocol import Example, Question
from .table import Table

V2 = "longbench-v2"
_V1_FIELDS = {"input": str, "context": str, "answers": list, "length": int, "dataset": str, "all_classes": list | None}
_CHOICES = tuple(f"choice_{letter}" for letter in "ABCD")
_V2_TEXTS = ("question", *_CHOICES, "answer", "context", "domain", "difficulty", "length")
_V2_FIELDS = dict.fromkeys(_V2_TEXTS, str)
_TEMPLATE_ROOM = 100  # tokens reserved for the chat template around a prompt


@dataclasses.dataclass(frozen=True)
class Task:
    """Published settings of one dataset.

    Attributes:
      before, after: prompt template on both sides of the context.
      metric: a name in `metrics.METRICS`.
      chat: whether a chat model gets the prompt as a user message; false for few-shot and code tasks.
    """

    before: str
    after: str
    max_new_tokens: int
    metric: str
    chat: bool


@functools.cache
def tasks() -> dict[str, Task]:
    """Return the settings of every dataset by name."""
    asset = importlib.resources.files("razor_jax") / "assets/longbench.json"
    published = json.loads(asset.read_text(encoding="utf-8"))
    found = {}
    for name, task in {**published["v1"], V2: published["v2"]}.items():
        before, _, after = task.pop("prompt").partition("$DOC$" if name == V2 else "{context}")
        found[name] = Task(before, after, **task)
    return found


def read(paths: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the records of JSONL files or JSON arrays by dataset; a folder stands for all such files in it.

    Raises ValueError with file, record and field for an invalid record, FileNotFoundError for a folder without files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(file for file in path.glob("*.json*") if file.is_file()) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path} has no .jsonl or .json file")
        files += found
    records: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for number, record in enumerate(_parse(file), start=1):
            records.setdefault(_dataset(record, f"{file}, record {number}"), []).append(record)
    return records


def examples(
    params: Params, dataset: str, records: Sequence[Mapping[str, Any]], max_length: int | None = None
) -> list[Example]:
    """Make the prompts of one dataset, split after the context.

    max_length: longer prompts are truncated in the middle to this many tokens, as published. Default: the checkpoint's
    positions minus answer and chat template.

    Raises ValueError if instructions and question take more than half of `max_length`.
    """
    assets, task = params.assets, tasks()[dataset]
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("an evaluation on text needs a model with a tokenizer.json")
    longbench_metrics.check_libraries(task.metric)
    if max_length is None:
        max_length = params.config.max_position_embeddings - task.max_new_tokens - _TEMPLATE_ROOM
    max_length = check_int("max_length", max_length, 16)
    return [_example(assets, dataset, task, record, max_length) for record in records]


def options(params: Params, dataset: str, chat: bool | None = None) -> dict[str, Any]:
    """Return options for `protocol.run`: the published answer length, and user messages for a chat model."""
    task = tasks()[dataset]
    if chat is None:
        chat = params.assets is not None and params.assets.chat_template is not None
    return {"form": "user" if chat and task.chat else "raw", "max_new_tokens": task.max_new_tokens}


def scores(table: Table, setting: str) -> dict[str, float]:
    """Return mean scores, 0 to 100: "all", and per part of the dataset.

    Parts of v1 are LongBench-E's ranges of context words, parts of v2 are difficulties and lengths.
    """
    row, values = table[setting], {}
    cuts = [{"all"} | set(question.meta["cuts"]) for _, question in table.questions]
    for name in sorted(set().union(*cuts)):
        values[name] = 100 * float(np.mean([score for score, cut in zip(row.scores, cuts, strict=True) if name in cut]))
    return values


def _parse(file: Path) -> list[Any]:
    try:
        text = file.read_bytes().decode("utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSONL: {error}") from error


def _dataset(record: Any, where: str) -> str:
    """Return the name of a record's dataset; check its fields."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {record!r:.60} is not an object with LongBench's fields")
    fields = _V2_FIELDS if "choice_A" in record else _V1_FIELDS
    for field, kind in fields.items():
        if field not in record or not isinstance(record[field], kind):
            raise ValueError(f"{where}: field {field!r} is {record.get(field)!r:.60}, expected {kind}")
    if fields is _V2_FIELDS:
        if record["answer"] not in "ABCD":
            raise ValueError(f"{where}: answer {record['answer']!r} is not one of A, B, C, D")
        return V2
    name = record["dataset"].removesuffix("_e")
    if name not in tasks():
        raise ValueError(f"{where}: dataset {record['dataset']!r} is not one of {', '.join(tasks())}")
    if not record["answers"]:
        raise ValueError(f"{where}: field 'answers' is empty")
    if tasks()[name].metric == "longbench_classification" and not record["all_classes"]:
        raise ValueError(f"{where}: field 'all_classes' is empty, but {name} is scored by it")
    return name


def _example(assets: Assets, dataset: str, task: Task, record: Mapping[str, Any], max_length: int) -> Example:
    if dataset == V2:
        context, after = record["context"].strip(), task.after
        for mark, field in zip(("$Q$", "$C_A$", "$C_B$", "$C_C$", "$C_D$"), ("question", *_CHOICES), strict=True):
            after = after.replace(mark, record[field].strip())
        answers, cuts = (record["answer"],), [record["difficulty"], record["length"]]
    else:
        context, after = record["context"], task.after.replace("{input}", record["input"])
        answers = tuple(map(str, record["answers"]))
        if task.metric == "longbench_classification":
            answers = tuple(longbench_metrics.class_reference(answer, record["all_classes"]) for answer in answers)
        cuts = ["0-4k" if record["length"] < 4000 else "4-8k" if record["length"] < 8000 else "8k+"]
    prompt = truncate(assets, task.before + context + after, max_length, one_text=dataset == V2)
    if not prompt.endswith(after) or len(prompt) == len(after):
        raise ValueError(
            f"{dataset}: instructions and question take more than half of max_length={max_length:,} tokens, or the "
            "tokenizer does not reproduce them: raise max_length"
        )
    question = Question(after, answers, task.metric, meta={"cuts": cuts})
    return Example(prompt[: -len(after)], (question,), meta={"dataset": dataset})


def truncate(assets: Assets, text: str, max_length: int, one_text: bool = False) -> str:
    """Keep the first and last half of `max_length` tokens, decoded apart as in v1, or as one text as in v2."""
    ids = assets.encode(text)
    if len(ids) <= max_length:
        return text
    head, tail = ids[: max_length // 2], ids[-(max_length // 2) :]
    if one_text:
        return assets.decode([*head, *ids[-max_length // 2 :]])
    return assets.decode(head) + assets.decode(tail)

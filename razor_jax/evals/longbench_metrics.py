"""LongBench's scoring, with the quirks of the published scripts: figures are to be compared with published ones.

Facts of https://github.com/THUDM/LongBench (LongBench/metrics.py and eval.py; pred.py for v2). Of several references
the best counts. ROUGE is the library `rouge`, which the scripts use; Chinese is cut into words by `jieba`.
"""

from __future__ import annotations

import collections
import difflib
import importlib
import re
import string
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .metrics import Metric, metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_INSTALL = {"rouge": "pip install 'razor-jax[evals]'", "jieba": "pip install jieba"}


def best(function: Callable[[str, str], float]) -> Metric:
    """Return the best score over the references."""

    def over(answer: str, references: Sequence[str]) -> float:
        return max(function(answer, reference) for reference in references)

    return over


def first_line(function: Metric) -> Metric:
    """Score only the first line that is not empty of the few-shot tasks: the rest is the next example."""
    return lambda answer, references: function(answer.lstrip("\n").split("\n")[0], references)


def overlap(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Return F1 of two bags of words."""
    common = sum((collections.Counter(answer) & collections.Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


@metric("longbench_qa_f1")
@best
def qa_f1(answer: str, reference: str) -> float:
    """Return F1 of words, without case, punctuation and articles."""
    return overlap(_english(answer), _english(reference))


@metric("longbench_qa_f1_zh")
@best
def qa_f1_zh(answer: str, reference: str) -> float:
    """Return F1 of Chinese words, without punctuation."""
    return overlap(_chinese(answer), _chinese(reference))


@metric("longbench_rouge")
@best
def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1; 0 for an empty text, or a sentence too long for the library's recursion."""
    scorer = _library("rouge").Rouge(metrics=["rouge-l"])
    try:
        return scorer.get_scores(answer, reference)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


@metric("longbench_rouge_zh")
@best
def rouge_l_zh(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 of Chinese words."""
    cut = _library("jieba").cut
    return rouge_l(" ".join(cut(answer)), [" ".join(cut(reference))])


@best
def classification(answer: str, reference: str) -> float:
    """Return 1 / the number of classes that the answer names, if the right one is among them.

    The reference's lines are the right class and then all classes (`class_reference`).
    """
    right, *classes = reference.split("\n")
    named = [name for name in classes if name in answer]
    # A name inside the right one's does not count. The published loop shortens the list that it walks through, so it
    # passes over the name after each one taken out.
    at = 0
    while at < len(named):
        if named[at] in right and named[at] != right:
            named.remove(named[at])
        at += 1
    return 1.0 / len(named) if right in named else 0.0


def class_reference(right: str, classes: Sequence[str]) -> str:
    """Return the reference that `classification` reads."""
    return "\n".join([right, *classes])


@metric("longbench_count")
@best
def count(answer: str, reference: str) -> float:
    """Return the share of the answer's numbers that are the reference."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def _retrieval(pattern: str) -> Metric:
    return best(lambda answer, reference: count(answer, re.findall(pattern, reference)[:1]))


@metric("longbench_code")
@best
def code(answer: str, reference: str) -> float:
    """Return the similarity of the first line without a backtick or a comment, in whole per cent.

    The published requirements install fuzzywuzzy alone, whose `ratio` is then difflib's, rounded.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


@metric("longbench_v2")
@best
def letter(answer: str, reference: str) -> float:
    """Return whether "The correct answer is (X)" names the letter."""
    return float(extract_letter(answer) == reference)


def extract_letter(answer: str) -> str | None:
    """Return the letter that an answer names by the form that the prompt asks for, with brackets before without; or
    None.
    """
    answer = answer.strip().replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if found := re.search(pattern, answer):
            return found.group(1)
    return None


metric("longbench_qa_f1_first_line")(first_line(qa_f1))
metric("longbench_rouge_first_line")(first_line(rouge_l))
metric("longbench_classification")(first_line(classification))
metric("longbench_retrieval")(_retrieval(r"Paragraph (\d+)"))
metric("longbench_retrieval_zh")(_retrieval(r"段落(\d+)"))


def check_libraries(name: str) -> None:
    """Raise ModuleNotFoundError, with the fix, if the libraries of a metric are missing."""
    if "rouge" in name:
        _library("rouge")
    if name.endswith("_zh") and "retrieval" not in name:
        _library("jieba")


def _english(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def _chinese(text: str) -> list[str]:
    dropped = {*string.punctuation, *_CHINESE}
    words = (
        "".join("".join(c for c in word.lower() if c not in dropped).split()) for word in _library("jieba").cut(text)
    )
    return [word for word in words if word]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this LongBench task is scored with {name}: {_INSTALL[name]}") from error

"""What a table of figures needs beside it, to be repeated: machine, versions, command, weights. And atomic JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import write_text
from ..params import Params, architecture_fingerprint, weights_fingerprint
from .bench import machine

# Fields with one entry per question.
PER_QUESTION = ("questions", "scores")

_PACKAGES = ("razor-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
_INNERMOST, _BREAK = re.compile(r"[\[{][^\[\]{}]*[\]}]"), re.compile(r"\n\s*")


def provenance(params: Params, model: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return machine, versions of what computed (and of `packages`), the command line, the model and its fingerprints.

    A folder or file is named without its path: that is this machine's.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    program = [Path(sys.argv[0]).name] if main is None else ["python", "-m", main.name.removesuffix(".__main__")]
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "weights": weights_fingerprint(params),
        "architecture": architecture_fingerprint(params.config),
        "dtype": str(params.dtype),
        "command": shlex.join([*program, *sys.argv[1:]]),
        "machine": machine(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *packages)},
    }


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write a JSON file whole or not at all; returns its path. Makes the folder."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # Lists of numbers, and records without parts, go on one line: there are thousands. A string never holds a bare line
    # break, so only the layout changes.
    text = _INNERMOST.sub(lambda found: _BREAK.sub(" ", found.group()), text)
    return write_text(path, text + "\n")


def write_results(path: str | os.PathLike[str], content: Any) -> Path:
    """Write a summary to `path` and everything, per question, to `….questions.json` beside it.

    The summary is small enough to keep under version control; it has the command that makes the rest.
    """
    path = Path(path)
    write_json(path.with_suffix(".questions.json"), content)
    return write_json(path, summary(content))


def summary(content: Any) -> Any:
    """Return the content without the figures of single questions."""
    if isinstance(content, list):
        return [summary(part) for part in content]
    if not isinstance(content, dict):
        return content
    kept = {name: part for name, part in content.items() if not (name in PER_QUESTION and isinstance(part, list))}
    found = {name: summary(part) for name, part in kept.items()}
    if isinstance(questions := content.get("questions"), list):
        found |= {"questions": len(questions), "cells": _cells(questions, content.get("settings", []))}
    return found


def _cells(questions: list[dict[str, Any]], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the accuracy of each setting by length and depth, where questions have a depth."""
    places = sorted({(q.get("length", 0), q["depth"]) for q in questions if q.get("depth") is not None})
    cells = []
    for place in places:
        at = [i for i, q in enumerate(questions) if (q.get("length", 0), q.get("depth")) == place]
        right = {row["setting"]: round(sum(row["scores"][i] for i in at) / len(at), 4) for row in settings}
        cells.append({"length": place[0], "depth": place[1], "questions": len(at), "right": right})
    return cells


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

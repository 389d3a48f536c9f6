"""Methods as JSON, beside a saved cache."""

from __future__ import annotations

import dataclasses
from typing import Any

from .base import CacheMethod
from .kvzip import RepetitionScores
from .learned import LearnedMethod
from .registry import METHODS

# Fitted parts are in a file of their own, so a record could not make such a method again.
_CLASSES = {cls.__name__: cls for cls in (*METHODS.values(), RepetitionScores) if not issubclass(cls, LearnedMethod)}


def to_record(method: CacheMethod) -> dict[str, Any]:
    """Return a method as JSON that `from_record` reads.

    Raises ValueError for a class outside the registry, because no other process could find it, and for fields that are
    more than settings.
    """
    kind, fields = type(method).__name__, {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    settings = all(x is None or isinstance(x, CacheMethod | int | float | str | tuple) for x in fields.values())
    if _CLASSES.get(kind) is not type(method) or not settings:
        raise ValueError(
            f"caches of {method.name} are not saved: save one of {', '.join(_CLASSES)}, of a RazorConfig or dense"
        )
    return {"class": kind} | {name: to_record(x) if isinstance(x, CacheMethod) else x for name, x in fields.items()}


def from_record(record: dict[str, Any]) -> CacheMethod:
    """Return the method of a record. Raises KeyError or TypeError for a class or field that is unknown."""
    fields: dict[str, Any] = {name: from_record(x) if isinstance(x, dict) else _tuples(x) for name, x in record.items()}
    return _CLASSES[fields.pop("class")](**fields)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x

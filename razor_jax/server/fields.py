"""Checked fields of a JSON request."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from .errors import ApiError

# Fields of OpenAI's API that change nothing about an answer.
WITHOUT_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
)
# Fields of OpenAI's API that are not implemented, with the values that ask for nothing.
NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": (),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}


class Fields:
    """Fields of a request. `null` counts as absent."""

    def __init__(self, body: Mapping[str, Any], known: Collection[str]):
        """Refuse fields that are unknown or not implemented. Raises ApiError that names the field."""
        self._values = {name: value for name, value in body.items() if value is not None}
        for name, value in self._values.items():
            if name in known or name in WITHOUT_EFFECT:
                continue
            if name not in NOT_IMPLEMENTED:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known fields are {', '.join(sorted(known))}"
                raise ApiError(f"unknown field {name!r}: {hint}", param=name, code="unknown_parameter")
            if value not in NOT_IMPLEMENTED[name]:
                message = f"{name!r} is not implemented here: leave it out"
                raise ApiError(message, param=name, code="unsupported_parameter")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field as it came."""
        return self._values.get(name, default)

    def number(self, name: str, default: float | None, low: float, high: float) -> Any:
        """Return a finite number of [low, high]."""
        value = self.get(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not low <= value <= high:
            raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        """Return an integer of [low, high]."""
        value = self.get(name, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise _wrong(name, value, f"an integer from {low:,} to {high:,}")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise _wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        """Return a string."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, str):
            raise _wrong(name, value, "a string")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object, {} if absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object")
        return value


def _wrong(name: str, value: Any, allowed: str) -> ApiError:
    return ApiError(f"{name}={short(value)}: must be {allowed}", param=name, code="invalid_value")


def short(value: Any) -> str:
    """Return JSON of at most 80 characters for an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"

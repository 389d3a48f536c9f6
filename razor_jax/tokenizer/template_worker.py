"""A program that renders chat templates: one JSON request per line on stdin, one JSON answer per line on stdout.

A template comes with a model, so it is a program of a stranger, and jinja's sandbox limits neither time nor memory:
`'x' * 10**10`, nested loops or lists of lists exhaust both inside one call that no thread can stop. This process limits
its memory itself, and `template_process`, which starts it, ends it when the time is over. It imports only jinja2 and
the standard library.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

if __name__ == "__main__":  # Started without the site module, which would double the start time.
    sys.path[:] = json.loads(sys.argv[1])

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows has no limits of this kind: there only time and size of the text are limited.
    resource = None


class _Refused(jinja2.TemplateError):
    """Error that `raise_exception` raises inside a template."""


class _TooLong(Exception):
    """Text longer than the request allows."""


class _Generation(jinja2.ext.Extension):
    """Extension that renders `{% generation %} … {% endgeneration %}` (a training mark) as its body."""

    tags = {"generation"}  # noqa: RUF012 — declared so by jinja

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer requests until stdin ends, as it does when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent.
    _write({"ready": True})
    for line in sys.stdin.buffer:
        _write(_answer(json.loads(line)))


def _write(answer: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"text": …}, or {"error": kind, "line": …, "message": …}."""
    call = request["call"]
    _limit_cpu(call["seconds"])
    _limit_memory(call["memory"])
    try:
        pieces = _compile(call["template"]).generate(request["variables"])
        return {"text": "".join(_limited(pieces, call["characters"]))}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "line": error.lineno, "message": error.message}
    except _Refused as error:
        return {"error": "refused", "line": _line(error), "message": error.message}
    except _TooLong:
        return {"error": "length", "line": 0, "message": ""}
    except MemoryError as error:
        _limit_memory(None)  # The answer needs memory too.
        return {"error": "memory", "line": _line(error), "message": ""}
    except Exception as error:  # A template is a program and may raise any Python error.
        return {"error": "failed", "line": _line(error), "message": f"{type(error).__name__}: {error}"}


def _limited(pieces: Iterator[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        characters -= len(piece)
        if characters < 0:
            raise _TooLong
        yield piece


def _limit_cpu(seconds: int) -> None:
    """End this process after `seconds` more of CPU time, even if its parent is gone."""
    _set_limit("RLIMIT_CPU", int(time.process_time()) + seconds + 1)


def _limit_memory(size: int | None) -> None:
    """Limit this process to `size` bytes; None for no limit."""
    _set_limit("RLIMIT_AS", size)


def _set_limit(name: str, value: int | None) -> None:
    if resource is None:
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    unlimited = hard == resource.RLIM_INFINITY
    soft = hard if value is None else value if unlimited else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit on memory.
        resource.setrlimit(kind, (soft, hard))


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' `tojson` filter does. The filter of jinja escapes HTML, which changes prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _line(error: BaseException) -> int:
    """Return the line of the template that raised the error, 0 if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 0 for frame in reversed(frames) if frame.filename == "<template>"), 0)


if __name__ == "__main__":
    main()

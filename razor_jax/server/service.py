"""What every endpoint works with."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import time
from typing import Any

from starlette.requests import Request

from ..tokenizer.assets import Assets
from .errors import ApiError
from .exchange import Exchange
from .fields import Fields
from .generation import Engine, Generation
from .grammar import Grammars
from .limits import Limits, read_json
from .metrics import Metrics
from .prompt import Prompts
from .tokenize import Tokenizer


@dataclasses.dataclass(frozen=True)
class Service:
    """A model behind an engine.

    Attributes:
      name: of the model, as requests give it.
      vocab_size: V of the model.
      max_model_len: most tokens of prompt and answer.
    """

    engine: Engine
    assets: Assets
    name: str
    vocab_size: int
    max_model_len: int
    limits: Limits = dataclasses.field(default_factory=Limits)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.assets)

    @functools.cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.tokenizer, self.vocab_size, self.max_model_len)

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.assets, self.vocab_size)

    @functools.cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.engine, self.name)

    async def read(self, request: Request, known: frozenset[str]) -> Fields:
        """Return the fields of a request to this model. Raises ApiError."""
        fields = Fields(await read_json(request, self.limits), known)
        model = fields.text("model", self.name)
        if model != self.name:
            message = f"there is no model {model!r} here: the model is {self.name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return fields

    def require_ready(self) -> None:
        """Raise ApiError if the engine takes no requests now."""
        if not self.engine.ready:
            message = "the server starts or shuts down: try again later"
            raise ApiError(message, status=503, code="not_ready")

    def exchange(self, generations: list[Generation]) -> Exchange:
        """Return the exchange of a request's answers. Raises ApiError if they are too many."""
        if len(generations) > self.limits.answers:
            message = f"{len(generations)} answers, prompts times n: ask for at most {self.limits.answers} at once"
            raise ApiError(message, param="n", code="invalid_value")
        return Exchange(self.engine, generations, self.metrics.times())

    def head(self, id: str, kind: str) -> dict[str, Any]:
        """Return the first fields of a response."""
        return {"id": id, "object": kind, "created": int(time.time()), "model": self.name}


def new_id(prefix: str) -> str:
    """Return an id that no other response has."""
    return f"{prefix}-{secrets.token_hex(12)}"

"""`razor-jax serve --port`: HTTP for OpenAI's clients, from one device, a mesh, or a mesh of several hosts."""

from __future__ import annotations

import dataclasses
import functools
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import typer

from razor_jax import Params, RazorConfig
from razor_jax.cli import terminal
from razor_jax.cli.terminal import note

if TYPE_CHECKING:
    from razor_jax.server.engine import RazorEngine

Http = functools.partial(typer.Option, rich_help_panel="HTTP")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY = "RAZOR_JAX_API_KEY"
_CONTEXT = 8192  # Tokens of prompt and answer, unless the model was trained for fewer.


@dataclasses.dataclass(frozen=True)
class HttpOptions:
    """Where the server listens, and what it takes."""

    port: Annotated[int | None, Http(min=0, max=65535, help="Serve HTTP on this port; 0 for any free one.")] = None
    host: Annotated[str, Http(help="Address to listen on; other machines reach 0.0.0.0.")] = "127.0.0.1"
    api_key: Annotated[str | None, Http(envvar=_KEY, help="Bearer key that clients must send.")] = None
    served_name: Annotated[str | None, Http(help="Name of the model for clients; --model by default.")] = None
    slots: Annotated[int, Http(min=1, help="Answers that run at once.")] = 8
    max_model_len: Annotated[
        int | None, Http(min=2, help="Most tokens of prompt and answer; 8,192 by default, or what the model takes.")
    ] = None
    cache_gib: Annotated[
        float | None,
        Http(help="GiB of the KV cache that answers share; by default all slots at their longest fit."),
    ] = None
    request_seconds: Annotated[float, Http(min=0.001, help="Longest time of a request.")] = 600.0
    drain_seconds: Annotated[float, Http(min=0, help="Time for running answers after SIGTERM.")] = 30.0
    cors_origin: Annotated[
        list[str] | None, Http(help="Web origin whose pages may call the server; repeatable. None by default.")
    ] = None

    @property
    def given(self) -> list[str]:
        """Options that differ from their defaults, but the port and the key, which the environment may give."""
        fields = [field for field in dataclasses.fields(self) if field.name not in ("port", "api_key")]
        return [option(field.name) for field in fields if getattr(self, field.name) not in (field.default, [])]

    @property
    def shape(self) -> dict[str, Any]:
        """Options that every process of a server must share, none without a port."""
        names = ("slots", "max_model_len", "cache_gib")
        return {} if self.port is None else {"http": True} | {name: getattr(self, name) for name in names}


def option(name: str) -> str:
    """Return the option of a parameter."""
    return f"--{name.replace('_', '-')}"


def require_packages() -> None:
    """Raise ValueError if the extra `serve` is not installed."""
    try:
        from razor_jax.server import app, run  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f'HTTP needs {error.name}: pip install "razor-jax[serve]"') from error


def serve_http(http: HttpOptions, params: Params, razor: RazorConfig | None, model: str, new_tokens: int) -> None:
    """Serve a model until SIGTERM or Ctrl-C. Of several processes, process 0 listens and the others follow it."""
    from razor_jax.server.engine import RazorEngine

    if params.assets is None or params.assets.tokenizer_json is None:
        raise ValueError(f"{model} has no tokenizer.json: HTTP needs one for text")
    tokens = http.max_model_len or min(_CONTEXT, params.config.max_position_embeddings)
    engine = RazorEngine(
        params,
        razor=razor,
        slots=http.slots,
        capacity=tokens,
        cache_bytes=None if http.cache_gib is None else int(http.cache_gib * 2**30),
    )
    if jax.process_index() > 0:
        # Process 0 gets the signal too, and lets the others leave once its answers have ended.
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        engine.follow()
        return
    note(str(engine.sizes))
    code = _listen(http, engine, model, new_tokens)
    if engine.failure is not None:
        raise engine.failure
    if code:
        raise typer.Exit(code)


def _listen(http: HttpOptions, engine: RazorEngine, model: str, new_tokens: int) -> int:
    """Serve HTTP with an engine that has not started, and return the exit code."""
    from razor_jax.server import app, run, service
    from razor_jax.server.limits import Limits

    assert http.port is not None
    params, capacity = engine.params, engine.layout.spec.capacity
    assert params.assets is not None
    limits = Limits(new_tokens=new_tokens, request_seconds=http.request_seconds)
    name = http.served_name or _name(model)
    served = service.Service(engine, params.assets, name, params.config.vocab_size, capacity, limits)
    if http.api_key is None and http.host not in _LOOPBACK:
        terminal.warn(f"{http.host} is open to other machines and there is no key: give --api-key, or set {_KEY}")
    application = app.make_app(served, api_key=http.api_key or None, origins=http.cors_origin or ())
    return run.run(served, application, http.host, http.port, http.drain_seconds, _announce)


def refuse(reason: str, options: dict[str, tuple[Any, Any]]) -> None:
    """Raise BadParameter that names the options whose value is not their default. `options`: value and default."""
    if names := [option(name) for name, (value, default) in options.items() if value != default]:
        raise typer.BadParameter(f"{', '.join(names)}: {reason}")


def _name(model: str) -> str:
    """Return the name of a model: the last part of a path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _announce(address: str) -> None:
    note(f"listening on {address}; a page to try it is there, and {address}/ready says when the programs are compiled")

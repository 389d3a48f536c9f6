"""What a method learned of a model: arrays per layer in one file, bound to the weights that they were fitted to."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from ..compilation import user_cache
from ..files import atomic_file
from ..params import Params, architecture_fingerprint, weights_fingerprint
from .base import CacheMethod

Layer = Mapping[str, np.ndarray]
_FORMAT = "razor_jax.methods"


@dataclasses.dataclass(frozen=True)
class Learned:
    """Fitted parts of a method. Two are equal if their numbers are.

    Attributes:
      method: name in the registry.
      architecture, weights: fingerprints of the model.
      note: how they were fitted.
      loss: on texts that were not fitted, before and after.
      arrays: of each layer, KV heads in the checkpoint's order; of one layer if all share them.
      digest: of the arrays.
    """

    method: str
    architecture: str
    weights: str
    note: str
    loss: tuple[float, float]
    arrays: dataclasses.InitVar[Sequence[Layer]]
    digest: str = dataclasses.field(init=False)

    def __post_init__(self, arrays: Sequence[Layer]):
        digest = hashlib.sha256()
        for layer in arrays:
            for name in sorted(layer):
                digest.update(f"{name} {layer[name].dtype} {layer[name].shape}".encode())
                digest.update(np.ascontiguousarray(layer[name]).tobytes())
        # Beside the fields: those are compared, hashed and reported.
        object.__setattr__(self, "_layers", tuple(arrays))
        object.__setattr__(self, "digest", digest.hexdigest())

    def __str__(self) -> str:
        return self.digest[:8]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The arrays of each layer."""
        return self.__dict__["_layers"]

    def of_layer(self, layer: int) -> Layer:
        """Return the arrays of a layer."""
        return self.layers[layer if len(self.layers) > 1 else 0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays. Rows and prompts share them."""
        return sum(x.nbytes for layer in self.layers for x in layer.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, atomically, and return its path."""
        named = {
            f"{number}/{name}": np.ascontiguousarray(x)
            for number, layer in enumerate(self.layers)
            for name, x in layer.items()
        }
        fields = {name: getattr(self, name) for name in ("method", "architecture", "weights", "note", "loss")}
        with atomic_file(path) as partial:
            # `save_file` would make a file that only this user can read.
            partial.write_bytes(serialize(named, {"format": _FORMAT, "fields": json.dumps(fields)}))
        return Path(path).expanduser()


def load(path: str | os.PathLike[str]) -> Learned:
    """Return what `Learned.save` or `razor-jax fit` wrote. Raises FileNotFoundError or ValueError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `razor-jax fit --method … --model … --out {path}` writes it")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): fit again") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no fitted parts of a cache method: give a file that `razor-jax fit` wrote")
    layers: list[dict[str, np.ndarray]] = [{} for _ in range(1 + max(int(name.split("/")[0]) for name in arrays))]
    for name, x in arrays.items():
        number, name = name.split("/", 1)
        layers[int(number)][name] = x
    fields = json.loads(metadata["fields"])
    return Learned(**(fields | {"loss": tuple(fields["loss"]), "arrays": layers}))


def stored_path(params: Params, method: str) -> Path:
    """Return where `razor-jax fit` stores the parts of a method for these weights, in the user's cache folder."""
    fingerprints = architecture_fingerprint(params.config)[:16], weights_fingerprint(params)[:16]
    return user_cache() / "methods" / f"{method}-{'-'.join(fingerprints)}.safetensors"


@dataclasses.dataclass(frozen=True)
class LearnedMethod(CacheMethod):
    """A method with parts that were fitted to the model.

    Attributes:
      learned: the fitted parts, as `fit` or `load` returns them. None is refused once a model is known.
    """

    learned: Learned | None = None

    key: ClassVar[str]
    """Name in the registry."""
    by_head: ClassVar[bool] = True
    """Whether the arrays have a leading axis of KV heads."""

    @functools.cached_property
    def arrays(self) -> Mapping[str, Any]:
        """The arrays of a layer: of `with_parts` its own, otherwise those of the first. Shapes are the same."""
        assert self.learned is not None
        return self.learned.of_layer(0)

    def check_params(self, params: Params) -> None:
        """Raise ValueError without parts, or with those of another method or model."""
        command = (
            f"`razor-jax fit --method {self.key} --model …`, then repeat this "
            f"(Python: {type(self).__name__}(…, learned=load(FILE)))"
        )
        if not isinstance(self.learned, Learned):
            raise ValueError(f"{self.name} has to be fitted to the model first: {command}")
        if self.learned.method != self.key:
            raise ValueError(f"{self.name} was given the fitted parts of {self.learned.method!r}: {command}")
        model = architecture_fingerprint(params.config), weights_fingerprint(params)
        if (self.learned.architecture, self.learned.weights) != model:
            raise ValueError(
                f"{self.name} was fitted to another model (fingerprint {self.learned.weights[:12]}…, this model's is "
                f"{model[1][:12]}…): {command}"
            )

    def parts(self, layer: int, heads: tuple[int, ...]) -> Layer:
        """Return the arrays of a layer for its KV heads in this order."""
        assert self.learned is not None
        found = self.learned.of_layer(layer)
        return {name: x[list(heads)] for name, x in found.items()} if self.by_head else found

    def with_parts(self, parts: Any) -> LearnedMethod:
        """Return the method with the arrays of one layer."""
        method = dataclasses.replace(self)
        method.__dict__["arrays"] = parts
        return method

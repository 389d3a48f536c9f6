"""Head files of other projects: DuoAttention gates, and JSON dictionaries of the RazorAttention vendor tools.

Only text is read: tab-separated numbers and JSON. Opening a pickle (`.pt`, `.pkl`, …) can run code, so pickles are
refused by file name before any byte is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import HeadSplit, RazorConfig, check_int
from ..files import write_text
from .scores import HeadScores, ProbeMeta
from .select import Head

GATES, CONFIG = "full_attention_heads.tsv", "config.json"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")


@dataclasses.dataclass(frozen=True, eq=False)
class DuoPattern:
    """Gates that DuoAttention learned for a model.

    Attributes:
      gates: float64 [L, K], 0 (a streaming head) to 1 (a retrieval head).
      sinks, recent: first and newest tokens that a streaming head keeps.
    """

    gates: np.ndarray
    sinks: int
    recent: int

    @property
    def razor(self) -> RazorConfig:
        """Policy of the streaming heads. They have no compensation token."""
        return RazorConfig.compact(self.recent, sinks=self.sinks, compensation=False)

    def scores(self, group_size: int = 1) -> HeadScores:
        """Return the gates as head scores. `select(share=)` equals 1 - sparsity of DuoAttention.

        Both classes get the same score. Many trained gates are exactly 1. DuoAttention breaks such ties by noise;
        here the lower layer, then the lower head, wins, and the note of the split counts the ties.
        """
        gates = np.repeat(self.gates, group_size, axis=1)
        return HeadScores(gates, gates, self.gates.shape[1], ProbeMeta("duo", note="DuoAttention's gates"))

    def split(self, threshold: float = 0.5) -> HeadSplit:
        """Return the split of the heads whose gate is at least `threshold`."""
        L, K = self.gates.shape
        return HeadSplit.of(L, K, _pairs(self.gates >= threshold), note=f"DuoAttention, gate ≥ {threshold}")


def read_duo(folder: str | os.PathLike[str]) -> DuoPattern:
    """Read DuoAttention's `full_attention_heads.tsv` and `config.json` from a folder of attn_patterns/.

    Gates are clipped to 0..1, as in DuoAttention. Raises FileNotFoundError or ValueError, which name the file.
    """
    folder = Path(folder).expanduser()
    rows = [line.split("\t") for line in _text(folder / GATES).splitlines() if line.strip()]
    try:
        gates = np.asarray([[float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise ValueError(
            f"{folder / GATES}: must have one line per layer and one number per KV head, separated by tabs: {error}"
        ) from error
    if gates.ndim != 2 or not gates.size or not np.isfinite(gates).all():
        raise ValueError(f"{folder / GATES}: must be lines of equally many finite numbers, at least one line")
    config = _json(folder / CONFIG)
    try:
        sinks, recent = (
            check_int(name, config.get(name), least) for name, least in (("sink_size", 0), ("recent_size", 1))
        )
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return DuoPattern(np.clip(gates, 0.0, 1.0), sinks, recent)


def write_duo(folder: str | os.PathLike[str], split: HeadSplit, razor: RazorConfig) -> Path:
    """Write a split as gates of 0 and 1, and the sinks and window of the policy; return the folder.

    DuoAttention reads it with threshold=0.5 or sparsity = 1 - split.share. It has no compensation token, which is not
    written. Raises ValueError for a policy without a fixed window, because DuoAttention windows do not grow with the
    prompt.
    """
    if razor.window is None:
        raise ValueError(
            f"{razor.describe()}: DuoAttention has a fixed recent_size only; use RazorConfig.compact(window=…)"
        )
    folder = Path(folder).expanduser()
    lines = ("\t".join("1" if head in kept else "0" for head in range(split.num_kv_heads)) for kept in split.retrieval)
    write_text(folder / GATES, "\n".join(lines) + "\n")
    config = {"sink_size": razor.sinks, "recent_size": razor.window, "note": split.note}
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    return folder


def read_vendor(
    path: str | os.PathLike[str],
    *,
    num_layers: int,
    num_kv_heads: int,
    num_heads: int,
    heads: Literal["query", "kv"],
) -> HeadSplit:
    """Read `{"prefix_matching": {layer: [heads]}, "copying": {layer: [heads]}}` from JSON.

    prefix_matching lists induction heads, copying lists echo heads. Layers and heads count from 0.

    Args:
      heads: the kind of heads that the file numbers, "kv" or "query"; published files differ. Query head n belongs to
        KV head n // (num_heads / num_kv_heads). A KV head keeps everything if any of its query heads is listed.

    Raises FileNotFoundError or ValueError, which name the file.
    """
    if heads not in ("query", "kv"):
        raise ValueError(f"heads={heads!r}: say what the file numbers, 'query' heads or 'kv' heads")
    path = Path(path).expanduser()
    data = _json(path)
    group = num_heads // num_kv_heads if heads == "query" else 1
    most = num_kv_heads * group - 1
    classes: dict[str, set[Head]] = {}
    for name in ("prefix_matching", "copying"):
        layers = data.get(name)
        if not isinstance(layers, dict):
            raise ValueError(
                f"{path}: {name}={layers!r}: must be an object of layer: [heads]; both classes are required"
            )
        found = classes[name] = set()
        for layer, listed in layers.items():
            where = f"{path}: {name}[{layer!r}]"
            if not layer.isdecimal() or int(layer) >= num_layers:
                raise ValueError(f"{where}: the model has layers 0 to {num_layers - 1}")
            if not isinstance(listed, list):
                raise ValueError(f"{where}={listed!r}: must be a list of heads")
            for head in listed:
                try:
                    found.add((int(layer), check_int("head", head, 0, most) // group))
                except ValueError as error:
                    raise ValueError(f"{where}: {error} ({heads} heads)") from error
    both = len(classes["prefix_matching"] & classes["copying"])
    rule = f", a KV head if any of its {group} query heads is listed" if group > 1 else ""
    note = (
        f"{path.name}: {len(classes['prefix_matching'])} prefix_matching + {len(classes['copying'])} copying KV heads, "
        f"{both} in both{rule}"
    )
    return HeadSplit.of(num_layers, num_kv_heads, classes["prefix_matching"] | classes["copying"], note=note)


def _text(path: Path) -> str:
    """Return the text of a file. Refuse a pickle by its name, without opening it."""
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"{path}: razor_jax opens no pickle, because that can run code. If you trust the file: python -c "
            f"\"import json, torch; json.dump(torch.load('{path.name}', weights_only=True), open('heads.json', 'w'))\""
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}); a pickle with another suffix is not opened either"
        ) from error


def _json(path: Path) -> Mapping[str, Any]:
    text = _text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a JSON object, found {type(data).__name__}")
    return data


def _pairs(kept: np.ndarray) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(kept)]

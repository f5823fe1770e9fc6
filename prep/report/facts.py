"""What the dataset report says of bytes, models and time: from the index, dataset.json, and the logs of the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from nanodit.console import duration
from nanodit.storage import Storage
from prep.dataset.layers import LAYERS
from prep.dataset.layout import TAR_BLOCK
from prep.dataset.reader import Dataset

RUNS = 12  # listed, the newest first
View = dict[str, Any]


def layer_bytes(dataset: Dataset) -> View:
    """Bytes of every layer and member in all and per sample, and what the framing of the tars adds."""
    table, samples = dataset.table, len(dataset)
    layers, framing = [], 0
    for layer in dataset.layers:
        members = []
        for member in dataset.members(layer):
            if f"{layer}/{member}/length" not in table.column_names:  # a layer with a choice of members
                continue
            lengths = table[f"{layer}/{member}/length"].to_numpy()
            members.append({"name": member, "bytes": int(lengths.sum())})
            framing += int((-lengths % TAR_BLOCK + TAR_BLOCK).sum())
        layers.append({"name": layer, "bytes": sum(member["bytes"] for member in members), "members": members})
    total = sum(layer["bytes"] for layer in layers) + framing
    for one in [*layers, *(member for layer in layers for member in layer["members"])]:
        one |= {"each": one["bytes"] / samples, "share": one["bytes"] / total}
    return {"layers": layers, "framing": framing, "total": total, "each": total / samples}


def models(info: Mapping[str, Any]) -> list[View]:
    """What dataset.json says of every layer: model, fingerprint, and everything else as dotted names."""
    views = []
    for layer in [name for name in LAYERS if name in info["layers"]]:
        facts = _flat(info["layers"][layer])
        known = {name: facts.pop(name, None) for name in ("model", "backend", "fingerprint")}
        views.append({"name": layer, **known, "facts": sorted(facts.items())})
    return views


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": str(value)}
    return flat


def timings(runs: Sequence[Mapping[str, Any]]) -> View | None:
    """What the logs of the runs say: work per layer over all runs, and the newest runs; None without logs."""
    if not runs:
        return None
    work: dict[str, View] = {}
    listed = []
    for run in runs:
        done: dict[str, int] = {}
        for unit in run["units"]:
            layer = work.setdefault(unit["layer"], {"name": unit["layer"], "samples": 0, "seconds": 0.0})
            layer["samples"] += unit["samples"]
            layer["seconds"] += unit["seconds"]
            done[unit["layer"]] = done.get(unit["layer"], 0) + unit["samples"]
        seconds = run["seconds"]
        listed.append(run | {"work": _in_order(done), "took": None if seconds is None else took(seconds)})
    layers = [work[name] for name in _in_order(work)]
    most = max((layer["seconds"] for layer in layers), default=0) or 1
    for layer in layers:
        rate = layer["samples"] / layer["seconds"] if layer["seconds"] else None
        layer |= {"bar": layer["seconds"] / most, "rate": rate, "took": took(layer["seconds"])}
    return {"layers": layers, "runs": listed[::-1][:RUNS], "total": len(listed)}


def took(seconds: float) -> str:
    """Seconds as people read them; short ones with a digit after the point."""
    return f"{seconds:.1f}s" if seconds < 9.95 else duration(seconds)


def _in_order(layers: Mapping[str, Any]) -> dict[str, Any]:
    known = [name for name in LAYERS if name in layers]
    return {name: layers[name] for name in [*known, *sorted(set(layers) - set(known))]}


def read_runs(storage: Storage) -> list[View]:
    """What the logs say of every run, oldest first: ``number``, ``start`` (Unix time) and ``seconds`` where they are
    known, ``end``, and the ``units`` that were computed. Lines that are cut off, by a kill for example, are skipped.
    """
    runs = []
    for name in storage.names("runs/"):
        if not name.endswith("/log.jsonl"):
            continue
        run: View = {"number": name.split("/")[1], "start": None, "end": "killed", "seconds": None, "units": []}
        for line in storage.read(name).decode("utf-8", "replace").splitlines():
            # a broken line says nothing; its neighbours do
            with suppress(ValueError, TypeError, KeyError, OverflowError):
                _follow(run, json.loads(line))
        runs.append(run)
    return runs


def _follow(run: View, event: Mapping[str, Any]) -> None:
    """Add one event of a log to what is known of its run."""
    kind, time = event["event"], int(event["time"] * 1000) / 1000
    if kind == "start":
        run["start"] = time
    elif kind == "shard":
        kinds = {"layer": str, "samples": int, "seconds": float}
        run["units"] += [{name: kind(unit[name]) for name, kind in kinds.items()} for unit in event["units"]]
    elif kind in ("done", "failed", "interrupted"):
        run["end"] = kind
    if run["start"] is not None:
        run["seconds"] = max(0.0, time - run["start"])

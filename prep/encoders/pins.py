"""Which build of every hub model a dataset is made with: recorded when first used, in ``models.json``, and kept.

``models.json`` maps a model as the config names it to its commit and the SHA-256 of its files. A config filled in from
it (:func:`pin_config`) says all of that itself, so that workers on any machine, and runs after the hub's ``main`` has
moved, load the same bytes or refuse. Folders and files on this machine need none of it: their content is hashed.
A caption model whose servers a run starts is recorded likewise, with the digest that Ollama has for it as its commit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, sha256_file
from nanodit.storage import Storage, open_storage
from prep.config import PrepConfig
from prep.encoders.demo import known_words
from prep.encoders.hub import COMMIT, Pin, Reference, is_hub_file, resolve
from prep.encoders.registry import MODEL_LAYERS, NETWORKS, encoder_of, pose_file
from prep.encoders.weights import is_local

MODELS = "models.json"
# As published at huggingface.co/yzd-v/DWPose, both commits of 2023; github.com/IDEA-Research/DWPose links there.
PUBLISHED = {
    "yolox_l.onnx": "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
    "dw-ll_ucoco_384.onnx": "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
}


def read_pins(place: Path | str | Storage) -> dict[str, Pin]:
    """Read what ``models.json`` of a dataset records; empty before the first. Raises DataError for a damaged file."""
    storage = open_storage(place)
    if not storage.exists(MODELS):
        return {}
    try:
        return {name: Pin(**fields) for name, fields in json.loads(storage.read(MODELS)).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{storage.where(MODELS)} is damaged ({error}). Restore it, or delete it: the models are then recorded "
            "anew, and what was made with others is computed again"
        ) from error


def write_pins(place: Path | str | Storage, pins: Mapping[str, Pin]) -> None:
    """Record ``pins`` in the dataset, unless it records just them already."""
    if not pins or pins == read_pins(place):
        return
    open_storage(place).write(MODELS, canonical_json({name: vars(pin) for name, pin in pins.items()}))


def unknown_models(config: PrepConfig, pins: Mapping[str, Pin]) -> dict[str, Reference]:
    """Return what of :func:`hub_models` is not recorded yet."""
    return {part: reference for part, reference in hub_models(config).items() if str(reference) not in pins}


def resolve_models(config: PrepConfig, pins: Mapping[str, Pin]) -> dict[str, Pin]:
    """``pins`` and what the active layers need besides; downloads and hashes models that are not recorded yet.

    Writes nothing into the dataset; :func:`write_pins` records the result. Raises ConfigError for a model that cannot
    be had.
    """
    known = dict(pins)
    missing = unknown_models(config, pins)
    if missing:
        with Progress("models", len(missing), unit="models") as progress:
            for reference in missing.values():
                known[str(reference)] = resolve(reference)
                progress.advance()
                say(f"{reference} is pinned to commit {known[str(reference)].revision}")
    return known


def pin_config(config: PrepConfig, pins: Mapping[str, Pin]) -> PrepConfig:
    """``config`` with commits, hashes, words and absolute paths filled in: it means the same models on every machine.

    What ``pins`` does not know stays as it is: :func:`resolve_models` comes first, but for a plan that downloads
    nothing. Filling in twice changes nothing. Raises ConfigError when hashes are given without their commit.
    """
    models = hub_models(config)
    update: dict[str, Any] = {}
    for layer in MODEL_LAYERS:
        section = getattr(config, layer)
        if section.model and is_local(section.model):
            update[layer] = section.model_copy(update={"model": str(Path(section.model).absolute())})
        elif layer in models and (pin := pins.get(str(models[layer]))):
            chosen = {"model": models[layer].model, "revision": pin.revision, "sha256": pin.files}
            update[layer] = section.model_copy(update=chosen)
    if config.t5.words is not None:
        update["t5"] = config.t5.model_copy(update={"words": known_words(config.t5.words)})
    if config.encoders == "production" or config.pose.detector or config.pose.pose:
        update["pose"] = config.pose.model_copy(update=_pin_pose(config, models, pins))
    captions = config.captions
    if captions.own_servers and not captions.digest and (pin := pins.get(captions.model)):
        update["captions"] = captions.model_copy(update={"digest": pin.revision})
    return config.model_copy(update=update)


def _pin_pose(config: PrepConfig, models: Mapping[str, Reference], pins: Mapping[str, Pin]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    hashes = dict(config.pose.sha256 or {})
    for network in NETWORKS:
        value = pose_file(config, network)
        if value is None:
            continue
        if network in models and (pin := pins.get(str(models[network]))):
            reference = models[network]
            chosen[network] = str(Reference(reference.model, pin.revision, reference.file))
            hashes[network] = pin.files[reference.file]
        elif is_hub_file(value):
            chosen[network] = value
        else:
            chosen[network] = str(Path(value).absolute())
    return chosen | {"sha256": hashes or None}


def hub_models(config: PrepConfig) -> dict[str, Reference]:
    """Return the hub models of the active layers that the config itself does not pin.

    By what it is for: the layer, and "detector" and "pose" for the two files of the pose layer.
    """
    models = {}
    for layer in MODEL_LAYERS:
        section = getattr(config, layer)
        name = section.model or (encoder_of(layer).model if config.encoders == "production" else None)
        if section.sha256 and (name is None or is_local(name)):
            raise ConfigError(
                f"{layer}.sha256 is only for models from the hub, unlike {name or 'the demo encoder'}: a folder is "
                "recorded by its content. Leave it out"
            )
        if layer not in config.active_layers or name is None or is_local(name):
            continue
        if section.sha256 is None:
            models[layer] = Reference(name, section.revision)
        elif not COMMIT.fullmatch(section.revision or ""):
            raise ConfigError(
                f"{layer}.sha256 is given for {name} without the commit of the files. Set {layer}.revision "
                "to its 40 digits, or leave both out: the dataset's models.json then records them"
            )
    for network in NETWORKS:
        value = pose_file(config, network)
        if "pose" not in config.active_layers or value is None or not is_hub_file(value):
            continue
        reference = Reference.parse(value)
        if network not in (config.pose.sha256 or {}) or not COMMIT.fullmatch(reference.revision or ""):
            models[network] = reference
    return models


def other_networks(config: PrepConfig) -> list[str]:
    """Warn of each pose file that bears a published file's name but has other bytes; for pinned configs."""
    warnings = []
    for network in NETWORKS:
        value = pose_file(config, network)
        if "pose" not in config.active_layers or value is None:
            continue
        if is_hub_file(value):
            name, sha256 = Reference.parse(value).file, (config.pose.sha256 or {}).get(network)
        else:
            path = Path(value)
            name, sha256 = path.name, sha256_file(path) if path.is_file() else None
        if sha256 and PUBLISHED.get(name, sha256) != sha256:
            warnings.append(f"{value} is not the file that DWPose's authors published as {name} (SHA-256 {sha256})")
    return warnings

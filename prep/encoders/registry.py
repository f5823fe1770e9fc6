"""Which models the config names, what they are called in recipes, and how to build them.

An encoder is imported when it is needed, and imports torch and transformers, which take seconds, when it is built: a
plan asks for fingerprints alone.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.dataset.layers import LAYERS, Encoder, option
from prep.encoders.hub import Reference

POSE_FOLDER = Path("models")  # where DWPose's files are looked for before the hub is asked
NETWORKS = tuple(LAYERS["pose"].encoder.files)  # "detector" and "pose", of the pose layer
MODEL_LAYERS = tuple(name for name, layer in LAYERS.items() if layer.encoder and layer.encoder.model)


def encoder_of(layer: str) -> Encoder:
    """Return the record of the encoder of a layer that has one."""
    encoder = LAYERS[layer].encoder
    assert encoder is not None, layer
    return encoder


def encoder_arguments(config: PrepConfig, layer: str) -> dict[str, Any]:
    """Return the arguments that the encoder of a layer and its ``fingerprint`` function share."""
    section, encoder = getattr(config, layer), encoder_of(layer)
    models: dict[str, Any] = {layer: encoder.model, **encoder.files}
    if config.encoders == "demo":
        from prep.encoders.demo import build_demo_encoders, demo_folder, known_words

        words = None if config.t5.words is None else known_words(config.t5.words)
        models = vars(build_demo_encoders(demo_folder(words), words))
    arguments: dict[str, Any] = {}
    if encoder.files:
        arguments = {network: pose_file(config, network) or models[network] for network in encoder.files}
    elif encoder.model:  # None: an encoder that is its own demo
        arguments = {"model": section.model or models.get(layer), "revision": section.revision}
    if arguments:
        arguments["sha256"] = section.sha256
    return arguments | {name: option(config, layer, name) for name in encoder.options}


def pose_file(config: PrepConfig, network: str) -> str | None:
    """Return the file of the network "detector" or "pose": a path, or ``MODEL:FILE`` on the hub; None for the demo's.

    The full-size ones are taken from ``models/`` where they lie there.
    """
    if given := getattr(config.pose, network):
        return given
    if config.encoders == "demo":
        return None
    published = encoder_of("pose").files[network]
    local = POSE_FOLDER / str(Reference.parse(published).file)
    return str(local) if local.is_file() else published


def encoder_fingerprint(config: PrepConfig, layer: str) -> dict[str, Any]:
    """Return everything that determines the features of an encoder layer, without loading its weights."""
    return import_module(encoder_of(layer).module).fingerprint(**encoder_arguments(config, layer))


def model_name(config: PrepConfig, layer: str, encoder: dict[str, Any]) -> str:
    """Return what people call the model of a layer whose fingerprint is ``encoder``, without any path.

    "demo" for the built-in stand-ins, "dwpose" for networks of one's own, else the name on the hub, or "local".
    """
    files = encoder_of(layer).files
    given = [getattr(getattr(config, layer), name, None) for name in files or ("model",)]
    if config.encoders == "demo" and not any(given):
        return "demo"
    return "dwpose" if files else encoder.get("model", "local")


def build_encoder(config: PrepConfig, layer: str, device: str) -> Any:
    """Return the encoder of a layer, loaded onto a device."""
    arguments = encoder_arguments(config, layer)
    if encoder_of(layer).files:  # onnxruntime, whose memory has a limit: the user's word, else that of the record
        arguments["memory_gb"] = config.placement.vram_gb.get(layer)
    return import_module(encoder_of(layer).module).build(**arguments, device=device)

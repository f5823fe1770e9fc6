"""Which models the config names, what they are called in recipes, and how to build them.

torch and transformers take seconds to import, so every import of an encoder happens when it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.encoders.hub import Reference, check_bytes, download_file, is_hub_file

# What `encoders: production` stands for.
PRODUCTION = {
    "t5": "google-t5/t5-large",
    "dino": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "detector": "yzd-v/DWPose:yolox_l.onnx",
    "pose": "yzd-v/DWPose:dw-ll_ucoco_384.onnx",
}
POSE_FOLDER = Path("models")  # where DWPose's files are looked for before the hub is asked
NETWORKS = ("detector", "pose")  # of the pose layer
# Half the crop's resolution is a quarter of the encoder's cost and of the bytes; the demo images are small already.
INPUT_SCALE = {"production": 0.5, "demo": 1.0}
ENCODER_LAYERS = ("t5", "dino", "pose")


def encoder_arguments(config: PrepConfig, layer: str) -> dict[str, Any]:
    """The arguments that the encoder of a layer and its ``fingerprint`` function share."""
    models: dict[str, Any] = PRODUCTION
    if config.encoders == "demo":
        from prep.encoders.demo import build_demo_encoders, demo_folder

        models = vars(build_demo_encoders(demo_folder()))
    if layer == "t5":
        section = config.t5
        return {
            "model": section.model or models["t5"],
            "revision": section.revision,
            "sha256": section.sha256,
            "max_tokens": section.max_tokens,
        }
    if layer == "dino":
        scale = config.dino.input_scale or INPUT_SCALE[config.encoders]
        return {
            "model": config.dino.model or models["dino"],
            "revision": config.dino.revision,
            "sha256": config.dino.sha256,
            "input_scale": scale,
        }
    files = {network: pose_file(config, network) or models[network] for network in NETWORKS}
    return files | {"sha256": config.pose.sha256}


def pose_file(config: PrepConfig, network: str) -> str | None:
    """The file of the network "detector" or "pose": a path, or ``MODEL:FILE`` on the hub; None for the demo's.

    The full-size ones are taken from ``models/`` where they lie there.
    """
    if given := getattr(config.pose, network):
        return given
    if config.encoders == "demo":
        return None
    local = POSE_FOLDER / str(Reference.parse(PRODUCTION[network]).file)
    return str(local) if local.is_file() else PRODUCTION[network]


def encoder_fingerprint(config: PrepConfig, layer: str) -> dict[str, Any]:
    """Everything that determines the features of an encoder layer, without loading its weights."""
    if layer == "t5":
        from prep.encoders.t5 import fingerprint
    elif layer == "dino":
        from prep.encoders.dinov3 import fingerprint
    else:
        from prep.encoders.dwpose import fingerprint
    return fingerprint(**encoder_arguments(config, layer))


def model_name(config: PrepConfig, layer: str, encoder: dict[str, Any]) -> str:
    """What people call the model of a layer whose fingerprint is ``encoder``, without any path.

    "demo" for the built-in stand-ins, "dwpose" for networks of one's own, else the name on the hub, or "local".
    """
    given = (config.pose.detector, config.pose.pose) if layer == "pose" else (getattr(config, layer).model,)
    if config.encoders == "demo" and not any(given):
        return "demo"
    return "dwpose" if layer == "pose" else encoder.get("model", "local")


def build_encoder(config: PrepConfig, layer: str, device: str) -> Any:
    """The encoder of a layer, loaded onto a device; which DINO it is, the model's own config says."""
    arguments = encoder_arguments(config, layer)
    if layer == "t5":
        from prep.encoders.t5 import T5Encoder as Encoder
    elif layer == "dino":
        from prep.encoders.dinov2 import DINOv2Encoder
        from prep.encoders.dinov3 import DINOv3Encoder
        from prep.encoders.weights import architecture

        older = architecture(arguments["model"], arguments["revision"]) in DINOv2Encoder.MODELS
        Encoder = DINOv2Encoder if older else DINOv3Encoder
    else:
        from prep.encoders.dwpose import DWPose

        sha256 = arguments["sha256"] or {}
        return DWPose(*(_onnx_file(arguments[network], sha256.get(network)) for network in NETWORKS), device)
    return Encoder(**arguments, device=device)


def _onnx_file(value: str | Path, sha256: str | None) -> Path:
    """A network's file on this machine, downloaded where it is on the hub, and checked where its hash is known."""
    path = Path(value)
    if is_hub_file(value):
        reference = Reference.parse(str(value))
        path = download_file(reference, reference.file)
    if sha256:
        check_bytes(path, sha256, str(value))
    return path

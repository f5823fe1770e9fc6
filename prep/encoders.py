"""Which models the config names, what they are called in recipes, and how to build them.

torch and transformers take seconds to import, so every import of an encoder happens when it is needed.
"""

from __future__ import annotations

from typing import Any

from prep.settings import PrepConfig

# What `encoders: production` stands for. The DWPose files are at huggingface.co/yzd-v/DWPose.
PRODUCTION = {
    "t5": "google-t5/t5-large",
    "dino": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "detector": "models/yolox_l.onnx",
    "pose": "models/dw-ll_ucoco_384.onnx",
}
# Half the crop's resolution is a quarter of the encoder's cost and of the bytes; the demo images are small already.
INPUT_SCALE = {"production": 0.5, "demo": 1.0}
ENCODER_LAYERS = ("t5", "dino", "pose")


def encoder_arguments(config: PrepConfig, layer: str) -> dict[str, Any]:
    """The arguments that the encoder of a layer and its ``fingerprint`` function share."""
    models: dict[str, Any] = PRODUCTION
    if config.encoders == "demo":
        from prep.demo import build_demo_encoders, demo_folder

        models = vars(build_demo_encoders(demo_folder()))
    if layer == "t5":
        section = config.t5
        return {
            "model": section.model or models["t5"],
            "revision": section.revision,
            "max_tokens": section.max_tokens,
        }
    if layer == "dino":
        scale = config.dino.input_scale or INPUT_SCALE[config.encoders]
        return {
            "model": config.dino.model or models["dino"],
            "revision": config.dino.revision,
            "input_scale": scale,
        }
    return {
        "detector": config.pose.detector or models["detector"],
        "pose": config.pose.pose or models["pose"],
    }


def encoder_fingerprint(config: PrepConfig, layer: str) -> dict[str, Any]:
    """Everything that determines the features of an encoder layer, without loading its weights."""
    if layer == "t5":
        from prep.t5 import fingerprint
    elif layer == "dino":
        from prep.dinov3 import fingerprint
    else:
        from prep.dwpose import fingerprint
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
    """The encoder of a layer, loaded onto a device."""
    if layer == "t5":
        from prep.t5 import T5Encoder as Encoder
    elif layer == "dino":
        from prep.dinov3 import DINOv3Encoder as Encoder
    else:
        from prep.dwpose import DWPose as Encoder
    return Encoder(**encoder_arguments(config, layer), device=device)

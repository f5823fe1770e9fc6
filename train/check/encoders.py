"""The encoders of ``prep`` at their real size, with random weights: rates, memory against its estimates, overflow."""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prep.dataset.layers as layers
import prep.passes.placement as placement
from nanodit.config import load_config
from nanodit.files import canonical_json
from nanodit.rng import generator
from prep.config import PrepConfig
from prep.encoders.registry import NETWORKS, build_encoder, pose_file
from prep.encoders.weights import compute_dtype, quiet_transformers
from prep.passes.crops import encode_beside
from prep.passes.placement import vram_need
from train.check.report import Constant, Report, Setting, constant
from train.check.timing import median_seconds, seconds_of

BATCH = placement.TABLE_BATCH
AHEAD = placement.ACTOR_CPUS + 1  # threads of a worker
MEMORY, RATE = (0.4, 1.0), (0.5, math.inf)  # measured / estimate; a faster card than the one thought of is no error
COSINE = 0.98  # of features in bf16 with those in fp32, worst of a few
WORDS = ("a", "woman", "man", "in", "red", "blue", "coat", "stands", "before", "the", "wall")


def check(setting: Setting, report: Report) -> None:
    """Build each encoder from its config, and time a batch of it."""
    prep = load_config(PrepConfig, None, ["source=.", "output=none"])
    if importlib.util.find_spec("transformers") is None:
        report.note("T5 and DINO", "left out: transformers is not installed")
    else:
        _t5(setting, report, prep)
        _dino(setting, report, prep)
    _pose(setting, report, prep)


def t5_config(tiny: bool) -> Any:
    """Return the config of T5-Large's encoder, or of a tiny one."""
    from transformers import T5Config

    size = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128}
    if tiny:
        size = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 1000}
    return T5Config(**size, feed_forward_proj="relu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1)


def dino_config(tiny: bool) -> Any:
    """Return the config of DINOv3's ViT-L/16, or of a tiny one."""
    from transformers import DINOv3ViTConfig

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    if tiny:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return DINOv3ViTConfig(**size, patch_size=16, num_register_tokens=4)


def _t5(setting: Setting, report: Report, prep: PrepConfig) -> None:
    from transformers import T5EncoderModel, T5Tokenizer

    from prep.encoders.demo import pieces
    from prep.encoders.t5 import T5Encoder

    folder = setting.folder / "t5"
    _write(setting, folder, T5EncoderModel, t5_config(setting.tiny))
    T5Tokenizer(vocab=pieces(WORDS), extra_ids=0, model_max_length=512).save_pretrained(folder)
    tokens = 32 if setting.tiny else prep.t5.max_tokens
    words = generator("check", "captions").choice(WORDS, (BATCH, tokens - 2))
    captions = [" ".join(row) for row in words.tolist()]
    encoder = _measured(setting, report, prep, "t5", lambda: T5Encoder(folder, device=str(setting.device)), captions)
    features = encoder.encode(captions[:2])
    report.check(
        all(np.isfinite(one.embedding).all() for one in features), "t5, overflow", "finite in float16", "finite"
    )
    _against_fp32(setting, report, "t5", encoder, lambda: encoder.encode(captions[:2])[0].embedding)


def _dino(setting: Setting, report: Report, prep: PrepConfig) -> None:
    from transformers import DINOv3ViTModel

    from prep.encoders.dinov3 import DINOv3Encoder

    folder, side = setting.folder / "dino", 128 if setting.tiny else prep.base
    _write(setting, folder, DINOv3ViTModel, dino_config(setting.tiny))
    images = generator("check", "images").integers(0, 256, (BATCH, side, side, 3), np.uint8)
    build = lambda: DINOv3Encoder(folder, device=str(setting.device), input_scale=0.5)  # noqa: E731
    encoder = _measured(setting, report, prep, "dino", build, images)
    _beside(setting, report, "dino", encoder, images)
    cls, patches = encoder.encode(images[:2])
    finite = bool(np.isfinite(cls).all() and np.isfinite(patches).all())
    report.check(finite, "dino, overflow", "finite" if finite else "not finite", "finite")
    _against_fp32(setting, report, "dino", encoder, lambda: encoder.encode(images[:2])[1])


def _pose(setting: Setting, report: Report, prep: PrepConfig) -> None:
    """Time DWPose where its files lie: they cannot be made up."""
    if importlib.util.find_spec("onnxruntime") is None:
        report.note("pose", "left out: onnxruntime is not installed")
        return
    import onnxruntime

    from prep.encoders.dwpose import providers

    report.note("onnxruntime", f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}")
    files = {name: pose_file(prep, name) for name in NETWORKS}
    if absent := [file for file in files.values() if not file or not Path(file).is_file()]:
        report.note("pose", f"left out: {' and '.join(map(str, absent))} not in models/")
        return
    side = 256 if setting.tiny else prep.base
    images = generator("check", "images").integers(0, 256, (BATCH, side, side, 3), np.uint8)
    encoder = build_encoder(prep, "pose", setting.device.type)
    first = seconds_of(lambda: list(encoder.samples(images)), setting.device)
    report.note("pose, first call", f"{first:.2f} s with {providers(setting.device.type)}")
    seconds = median_seconds(lambda: list(encoder.samples(images)), setting.device, warm_up=1, repeats=3)
    _rate(setting, report, "pose", len(images) / seconds)
    _beside(setting, report, "pose", encoder, images)


def _beside(setting: Setting, report: Report, layer: str, encoder: Any, images: np.ndarray) -> None:
    """Time the layer's work as a worker of ``prep`` does it: batches in threads beside the device."""
    batches = [[(f"{number}", image) for number, image in enumerate(images)]] * AHEAD * 2

    def compute() -> None:
        for _ in encode_beside(batches, encoder.samples, pool, AHEAD, lambda keys: None):
            pass

    with ThreadPoolExecutor(AHEAD) as pool:
        seconds = median_seconds(compute, setting.device, warm_up=1, repeats=1)
    report.note(f"{layer}, rate beside", f"{len(batches) * len(images) / seconds:.4g} items/s, {AHEAD} threads prepare")


def _write(setting: Setting, folder: Path, kind: Any, config: Any) -> None:
    """Save a model of random weights, in the type that it is computed in, made on the device."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = kind(config).to(compute_dtype(setting.device))
    with quiet_transformers():
        model.save_pretrained(folder)
    (folder / "made_up.json").write_text(canonical_json({"weights": "random"}))


def _measured(
    setting: Setting, report: Report, prep: PrepConfig, layer: str, build: Callable[[], Any], batch: Any
) -> Any:
    """Return an encoder after a batch of it was timed, and the memory of both measured."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    encoder = build()
    seconds = median_seconds(lambda: encoder.encode(batch), setting.device, warm_up=1, repeats=3)
    _rate(setting, report, layer, len(batch) / seconds)
    if setting.on_gpu:
        one = load_config(PrepConfig, None, ["source=.", "output=none", f"{layer}.batch_size={len(batch)}"])
        need = vram_need(one, [layer])
        peak = torch.cuda.max_memory_reserved(setting.device) / 1e9 + placement.CONTEXT_GB
        places = *_record(layer, "weights_gb", "activations_gb"), constant(placement, "CONTEXT_GB")
        report.estimate(f"{layer}, memory", need, peak, "GB", places, low=MEMORY[0], high=MEMORY[1])
    return encoder


def _record(layer: str, *names: str) -> tuple[Constant, ...]:
    return tuple(constant(layers, f"{layer.upper()}.encoder.{name}") for name in names)


def _rate(setting: Setting, report: Report, layer: str, rate: float) -> None:
    """Compare images a second with those of the layer's record: of a card, of captions of any length."""
    if not setting.on_gpu:
        report.note(f"{layer}, rate", f"{rate:.4g} items/s")
        return
    place = constant(layers, f"{layer.upper()}.rates")
    estimate = layers.LAYERS[layer].rates["cuda"]
    report.estimate(f"{layer}, rate", estimate, rate, "items/s", place, low=RATE[0], high=RATE[1])


def _against_fp32(setting: Setting, report: Report, layer: str, encoder: Any, features: Callable[[], Any]) -> None:
    """Compare the features with those of the same weights in fp32."""
    usual = torch.from_numpy(np.asarray(features(), np.float32)).flatten(0, -2)
    encoder.model.float()
    if hasattr(encoder, "dtype"):
        encoder.dtype = torch.float32
    exact = torch.from_numpy(np.asarray(features(), np.float32)).flatten(0, -2)
    cosine = float(torch.nn.functional.cosine_similarity(usual, exact, dim=1).nan_to_num(-1).min())
    dtype = compute_dtype(setting.device)
    report.check(cosine >= COSINE, f"{layer}, {dtype} to fp32", f"worst cosine {cosine:.5f}", f">= {COSINE:g}")

"""The encoders of ``prep`` at their real size, with random weights: rates, memory against its estimates, overflow.

A card is also shared by two processes, as ``prep`` does where there is room: whether they get more done than one.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prep.dataset.layers as layers
import prep.passes.placement as placement
from nanodit.config import load_config
from nanodit.files import canonical_json
from nanodit.place import child_command, child_environment
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
HALF = torch.finfo(torch.float16).max
READY = "ready"
PROCESSES, SHARED_SECONDS = 2, 4.0  # that share a card, and for how long
WORDS = ("a", "woman", "man", "in", "red", "blue", "coat", "stands", "before", "the", "wall")
MADE_UP = "made_up.json"  # written last beside the weights
SEARCHES = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")  # of cuDNN for its kernels, as onnxruntime calls them


def check(setting: Setting, report: Report) -> None:
    """Build each encoder from its config, and time a batch of it."""
    if importlib.util.find_spec("transformers") is None:
        report.note("T5 and DINO", "left out: transformers is not installed")
    else:
        _t5(setting, report)
        _dino(setting, report)
    _pose(setting, report)


def made_up_encoder(setting: Setting, layer: str) -> tuple[Any, Any]:
    """Return T5 or DINO with random weights, written below the folder of all parts if need be, and a batch for it."""
    folder, prep = setting.folder / layer, _prep()
    if layer == "t5":
        from transformers import T5EncoderModel, T5Tokenizer

        from prep.encoders.demo import pieces
        from prep.encoders.t5 import T5Encoder

        if not (folder / MADE_UP).exists():
            T5Tokenizer(vocab=pieces(WORDS), extra_ids=0, model_max_length=512).save_pretrained(folder)
            _write(setting, folder, T5EncoderModel, t5_config(setting.tiny))
        tokens = 32 if setting.tiny else prep.t5.max_tokens
        words = generator("check", "captions").choice(WORDS, (BATCH, tokens - 2))
        return T5Encoder(folder, device=str(setting.device)), [" ".join(row) for row in words.tolist()]
    from transformers import DINOv3ViTModel

    from prep.encoders.dinov3 import DINOv3Encoder

    if not (folder / MADE_UP).exists():
        _write(setting, folder, DINOv3ViTModel, dino_config(setting.tiny))
    side = 128 if setting.tiny else prep.base
    images = generator("check", "images").integers(0, 256, (BATCH, side, side, 3), np.uint8)
    return DINOv3Encoder(folder, device=str(setting.device), input_scale=0.5), images


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


def _t5(setting: Setting, report: Report) -> None:
    encoder, captions = _measured(setting, report, "t5")
    features = encoder.encode(captions[:2])
    finite = all(np.isfinite(one.embedding).all() for one in features)
    report.check(finite, "t5, features", "finite in float16" if finite else "not finite", "finite in float16")
    beyond, of = _beyond_half(encoder, lambda: encoder.encode(captions[:2]))
    report.note("t5, overflow", f"{beyond} of {of} values between its blocks are more than float16 holds")
    _against_fp32(setting, report, "t5", encoder, lambda: encoder.encode(captions[:2])[0].embedding)


def _dino(setting: Setting, report: Report) -> None:
    encoder, images = _measured(setting, report, "dino")
    _beside(setting, report, "dino", encoder, images)
    cls, patches = encoder.encode(images[:2])
    finite = bool(np.isfinite(cls).all() and np.isfinite(patches).all())
    report.check(finite, "dino, features", "finite" if finite else "not finite", "finite")
    beyond, of = _beyond_half(encoder, lambda: encoder.encode(images[:2]))
    report.note("dino, overflow", f"{beyond} of {of} values between its blocks are more than float16 holds")
    _against_fp32(setting, report, "dino", encoder, lambda: encoder.encode(images[:2])[1])


def _beyond_half(encoder: Any, encode: Callable[[], object]) -> tuple[int, int]:
    """Count what the blocks of a network hand on that float16 could not hold, and all that they do."""
    counts = np.zeros(2, np.int64)

    def count(module: object, inputs: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        counts[:] += int((~(hidden.abs() <= HALF)).sum()), hidden.numel()

    blocks = max((module for module in encoder.model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    hooks = [block.register_forward_hook(count) for block in blocks]
    encode()
    for hook in hooks:
        hook.remove()
    return int(counts[0]), int(counts[1])


def _pose(setting: Setting, report: Report) -> None:
    """Time DWPose where its files lie, as they cannot be made up; a rehearsal has the demo's networks."""
    if importlib.util.find_spec("onnxruntime") is None:
        report.note("pose", "left out: onnxruntime is not installed")
        return
    import onnxruntime

    available = onnxruntime.get_available_providers()
    report.note("onnxruntime", f"{onnxruntime.__version__}: {', '.join(available)}")
    if setting.on_gpu and "CUDAExecutionProvider" not in available:
        report.note("pose", "left out: this onnxruntime has no CUDA")
        return
    prep = _prep()
    if setting.tiny:
        from prep.encoders.demo import ASSETS, DETECTOR, POSE

        prep = _prep(f"pose.detector={ASSETS / DETECTOR}", f"pose.pose={ASSETS / POSE}")
    from prep.encoders.dwpose import providers

    files = {name: pose_file(prep, name) for name in NETWORKS}
    if absent := [file for file in files.values() if not file or not Path(file).is_file()]:
        report.note("pose", f"left out: {' and '.join(map(str, absent))} not in models/")
        return
    side = 256 if setting.tiny else prep.base
    images = generator("check", "images").integers(0, 256, (BATCH, side, side, 3), np.uint8)
    encoder = build_encoder(prep, "pose", setting.device.type)
    first = seconds_of(lambda: list(encoder.samples(images)), setting.device)
    seconds = median_seconds(lambda: list(encoder.samples(images)), setting.device, warm_up=0, repeats=3)
    report.note("pose, first batch", f"{first:.3g} s, later ones {seconds:.3g} s with {providers(setting.device.type)}")
    _rate(setting, report, "pose", len(images) / seconds)
    _beside(setting, report, "pose", encoder, images)
    for search in SEARCHES if setting.on_gpu else SEARCHES[:1]:
        _session(setting, report, str(files["detector"]), search)


def _session(setting: Setting, report: Report, file: str, search: str) -> None:
    """Say what a way to find cuDNN's kernels costs: seconds of the first and of later calls, and GB of the card."""
    import onnxruntime

    options = {"cudnn_conv_algo_search": search, "arena_extend_strategy": "kSameAsRequested"}
    provider = ("CUDAExecutionProvider", options) if setting.on_gpu else "CPUExecutionProvider"
    gc.collect()
    before = torch.cuda.mem_get_info(setting.device)[0] if setting.on_gpu else 0
    session = onnxruntime.InferenceSession(file, providers=[provider])
    given = {
        one.name: np.zeros([side if isinstance(side, int) else BATCH for side in one.shape], np.float32)
        for one in session.get_inputs()
    }
    call = lambda: session.run(None, given)  # noqa: E731
    first, later = seconds_of(call, setting.device), median_seconds(call, setting.device, warm_up=0, repeats=3)
    taken = (before - torch.cuda.mem_get_info(setting.device)[0]) / 1e9 if setting.on_gpu else 0.0
    name = search if setting.on_gpu else "no search on a CPU"
    report.note(f"pose, detector, {name}", f"first call {first:.3g} s, later ones {later:.3g} s, {taken:.3g} GB")


def _prep(*overrides: str) -> PrepConfig:
    return load_config(PrepConfig, None, ["source=.", "output=none", *overrides])


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
    (folder / MADE_UP).write_text(canonical_json({"weights": "random"}))


def _measured(setting: Setting, report: Report, layer: str) -> tuple[Any, Any]:
    """Return an encoder and a batch after that was timed, alone and by two processes, and its memory measured."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
    made_up_encoder(setting, layer)  # written, in whose place the one that is measured comes
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    encoder, batch = made_up_encoder(setting, layer)
    seconds = median_seconds(lambda: encoder.encode(batch), setting.device, warm_up=1, repeats=3)
    _rate(setting, report, layer, len(batch) / seconds)
    if setting.on_gpu:
        need = vram_need(_prep(f"{layer}.batch_size={len(batch)}"), [layer])
        peak = torch.cuda.max_memory_reserved(setting.device) / 1e9 + placement.CONTEXT_GB
        places = *_record(layer, "weights_gb", "activations_gb"), constant(placement, "CONTEXT_GB")
        report.estimate(f"{layer}, memory", need, peak, "GB", places, low=MEMORY[0], high=MEMORY[1])
    if setting.on_gpu or layer == "t5":  # a rehearsal starts these processes for one of them
        _together(setting, report, layer, len(batch) / seconds)
    return encoder, batch


def _together(setting: Setting, report: Report, layer: str, alone: float) -> None:
    """Let processes encode on the device at the same time, and compare what they do together with one ``alone``."""
    command = [*child_command("train.check.encoders"), str(setting.folder), setting.device.type, str(setting.tiny)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, layer], env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(PROCESSES)
        ]
        ready = [process.stdout.readline().strip() == READY for process in processes]
        said = [process.communicate("\n" if all(ready) else None)[0] for process in processes]
    codes = [process.returncode for process in processes]
    right = all(ready) and not any(codes)
    report.check(right, f"{layer}, {PROCESSES} processes", f"exit codes {codes}", f"{[0] * PROCESSES}")
    if right:
        rate = sum(items / seconds for items, seconds in map(json.loads, said))
        report.note(f"{layer}, {PROCESSES} at once", f"{rate:.4g} items/s together, {rate / alone:.3g} times one alone")


def main(folder: str, device: str, tiny: str, layer: str) -> None:
    """Encode batches from the moment on that stdin says so, and print their items and the seconds that they took."""
    setting = Setting(torch.device(device), tiny == "True", Path(folder), 60.0)
    encoder, batch = made_up_encoder(setting, layer)
    encoder.encode(batch)
    print(READY, flush=True)
    sys.stdin.readline()
    items, started = 0, time.perf_counter()
    while time.perf_counter() - started < (SHARED_SECONDS if setting.on_gpu else SHARED_SECONDS / 8):
        encoder.encode(batch)
        items += len(batch)
    print(json.dumps([items, time.perf_counter() - started]))


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


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The numbers of the text that the project started from, as literals: each row of docs/seed.md has one here.

A number that is promised has a literal in a test; a test that reads it from the code would follow every change.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from evaluate.__main__ import main as evaluate_main
from nanodit.config import load_config
from nanodit.keypoints import BODY_JOINTS, JOINTS
from prep.captions.config import CaptionConfig
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket, buckets_for, choose_bucket
from prep.dataset.layers import LAYERS
from prep.run import run as prepare
from train.__main__ import main as train_main
from train.config import CheckpointSection, TrainConfig, TrainSection
from train.loop import tracking
from train.loop.visual import VisualDebug
from train.method.dropout import PRESETS, ConditioningConfig
from train.method.ema import EmaConfig, ema_decay
from train.method.flow import FlowConfig, velocity
from train.method.optim import NS_COEFFICIENTS, OptimizerConfig, update_scale
from train.method.repa import RepaConfig
from train.method.sampling import SELF_GUIDANCE
from train.method.schedule import learning_rate
from train.model.layers import TimestepEmbedding
from train.model.modalities import NULL_JOINT_CONFIDENCE, Features
from train.model.network import build_model
from train.model.tread import TreadConfig
from train.plan.plan import look_ahead
from train.plan.rehearsal import open_dataset
from train.sweep.config import load_sweep

SEED = {
    "model": {"hidden_size": 768, "depth": 18, "num_heads": 12, "patch_size": 16, "in_channels": 3},
    "flow": {"prediction": "x", "logit_mean": 0.0, "logit_std": 1.0, "uniform_share": 0.0, "shift": 1.0, "t_min": 1.0},
    "tread": {"enabled": True, "start": 1, "end": -2, "keep": 0.5, "dense_tail": 0.0},
    "repa": {"enabled": True, "weight": 0.5, "schedule": "constant", "until": 1.0, "block_index": -1},
    "perceptual": {"every": 0},
    "optimizer": {
        "type": "muon", "muon_momentum": 0.95, "muon_nesterov": True, "muon_ns_steps": 5,
        "muon_adjust_lr": "match_rms_adamw", "muon_lr_factor": 1.0,
    },
    "train": {
        "steps": 6000, "batch_size": 1, "grad_accumulation_steps": 256, "token_budget": None,
        "phases": [{"until_step": 3000, "scale": 0.5}, {"until_step": 6000, "scale": 1.0}],
        "lr": 3e-4, "lr_min": 1e-6, "warmup": 500, "schedule": "cosine", "ema_decay": 0.9999, "ema_warmup": 500,
        "precision": "bf16", "gradient_checkpointing": "all",
    },
    "data": {"flip": 0.5},
    "checkpoint": {"every_steps": 500, "keep_last": None},
    "visual_debug": {"every_steps": 100, "count": 4, "guidance": {"self": 3.0}},
    "validation": {"samples": 25, "seed": 42, "tests": ["reconstruction", "swap", "edit", "divergence"]},
}  # fmt: skip
DROPOUT = {  # what is kept -> share
    (): 0.10, ("text",): 0.25, ("cls",): 0.05, ("patches",): 0.05, ("cls", "patches", "text"): 0.10, ("pose",): 0.05,
    ("cls", "patches", "pose", "text"): 0.40,
}  # fmt: skip


def resolved(name: str) -> TrainConfig:
    return load_config(TrainConfig, f"configs/train/{name}.yaml")


# The recipe


@pytest.mark.parametrize(("section", "expected"), SEED.items(), ids=SEED)
def test_the_resolved_recipe_has_the_numbers_of_the_text(section, expected):
    found = resolved("seed").model_dump(mode="json")[section]
    assert {key: found[key] for key in expected} == expected


def test_the_baseline_is_the_same_recipe_with_the_small_network():
    found, whole = (resolved(name).model_dump(mode="json") for name in ("seed-baseline", "seed"))
    assert {key: found["model"].pop(key) for key in ("hidden_size", "depth", "num_heads")} == {
        "hidden_size": 384, "depth": 12, "num_heads": 6,
    }  # fmt: skip
    for key in ("hidden_size", "depth", "num_heads"):
        del whole["model"][key]
    assert found | {"output": None} == whole | {"output": None}


@pytest.mark.parametrize(("name", "millions"), [("seed", 159.3), ("seed-baseline", 28.7)])
def test_the_size_of_the_networks(name, millions):
    config = resolved(name)
    dataset, _ = open_dataset(config, Path("configs/train/seed.yaml"), None)
    with torch.device("meta"):
        model = build_model(config.model, Features.from_dataset(dataset.info), config.tread)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_plan_says_what_patches_of_two_pixels_take():
    quick = ["model.depth=2", "tread.enabled=false", "visual_debug.guidance=1.0", "visual_debug.every_steps=0"]
    report = look_ahead(Path("configs/train/seed.yaml"), ["model.patch_size=2", *quick], memory="80GB")
    assert max(row["tokens"] for row in report.batches) == 262_144
    (note,) = (note for note in report.notes if "262,144" in note)
    assert note == (
        "262,144 tokens for an image of 1024x1024: attention takes time with their square; model.patch_size=8 makes "
        "them 16,384"
    )


def test_a_plan_names_patches_that_divide_every_bucket():
    """Of 640 pixels, in patches of 6, there would be few enough; but no side of a bucket has a multiple of 6."""
    quick = ["model.depth=2", "tread.enabled=false", "visual_debug.guidance=1.0", "visual_debug.every_steps=0"]
    few = ["train.steps=10", "train.grad_accumulation_steps=1", "train.phases=[]"]
    report = look_ahead(Path("configs/train/seed.yaml"), ["model.patch_size=2", *quick, *few], memory="80GB", base=640)
    (note,) = (note for note in report.notes if "tokens for" in note)
    assert note.endswith("attention takes time with their square; model.patch_size=8 makes them 6,400")


def test_the_defaults_of_the_flow():
    flow = FlowConfig()
    assert (flow.prediction, flow.logit_mean, flow.logit_std, flow.uniform_share) == ("x", 0.8, 0.8, 0.1)
    assert (flow.shift, flow.t_min) == ("auto", 0.05)
    for wrong in ({"uniform_share": 1.1}, {"uniform_share": -0.1}, {"t_min": 1.1}, {"t_min": 0.0}, {"logit_std": 0.0}):
        with pytest.raises(ValidationError):
            FlowConfig(**wrong)
    FlowConfig(uniform_share=1.0, t_min=1.0)
    assert [flow.shift_of(side, side) for side in (64, 256, 512, 768, 1024)] == [1, 1, 2, 3, 3]
    assert FlowConfig(shift=2.5).shift_of(1024, 1024) == 2.5
    ones, zeros, t = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.tensor([0.01])
    torch.testing.assert_close(velocity(zeros, ones, t), ones / 0.05)


@pytest.mark.parametrize("name", ["seed", "seed-baseline"])
def test_a_plan_is_made_before_there_is_a_dataset(name, tmp_path, capsys):
    quick = ["model.depth=4", "tread.enabled=false", "visual_debug.guidance=1.0"]
    missing = f"dataset={tmp_path / 'none'}"
    assert train_main(["plan", "--config", f"configs/train/{name}.yaml", missing, *quick]) == 0
    assert "loader here (measured, " in capsys.readouterr().out


def test_conditions_are_dropped_in_seven_exclusive_categories():
    table = ConditioningConfig(preset="seed").resolve()
    assert {tuple(sorted(subset)): share for subset, share in table.items()} == DROPOUT
    assert resolved("seed").conditioning.resolve() == table
    assert PRESETS["default"] == {
        "nothing": 0.10, "text": 0.20, "text+pose": 0.18, "pose": 0.05, "text+cls": 0.05, "text+cls+pose": 0.05,
        "cls": 0.03, "patches": 0.03, "cls+patches": 0.03, "cls+patches+pose": 0.03, "text+patches": 0.03,
        "text+cls+patches": 0.05, "all": 0.17,
    }  # fmt: skip
    assert PRESETS["quickstart"] == {"nothing": 0.10, "text": 0.25, "text+pose": 0.40, "all": 0.25}


def test_the_learning_rate_warms_up_for_500_steps_and_falls_from_3e_4_to_1e_6():
    train = resolved("seed").train
    rates = [
        learning_rate(step, 6000, train.lr, train.lr_min, train.warmup, train.schedule) for step in (0, 499, 500, 3250)
    ]
    assert rates == pytest.approx([3e-4 / 501, 3e-4 * 500 / 501, 3e-4, (3e-4 + 1e-6) / 2])
    assert learning_rate(5999, 6000, train.lr, train.lr_min, train.warmup) == pytest.approx(1e-6, rel=0.01)


def test_the_default_warm_up_is_500_steps_at_most():
    assert learning_rate(499, 10**6, 1.0, 0.0) == pytest.approx(500 / 501)
    assert learning_rate(500, 10**6, 1.0, 0.0) == 1.0


def test_routing_takes_half_of_the_tokens_past_blocks_1_to_depth_less_2():
    assert TreadConfig().keep == 0.5
    assert TreadConfig().kept(4096) == 2048
    assert TreadConfig(enabled=True).route(18) == range(1, 17)  # 16 of 18 blocks
    assert TreadConfig(enabled=True).route(12) == range(1, 11)
    assert (TreadConfig().dense_tail, TreadConfig().tail_routed) == (0.125, 0.1)
    for wrong in ({"keep": 0.0}, {"keep": 1.1}, {"dense_tail": 1.1}, {"tail_routed": 1.1}):
        with pytest.raises(ValidationError):
            TreadConfig(**wrong)


def test_self_guidance_has_scale_3():
    assert SELF_GUIDANCE == 3.0


def test_repa_aligns_the_state_after_half_of_the_blocks_with_weight_a_half():
    assert RepaConfig().weight == 0.5
    assert (RepaConfig().blocks(18), RepaConfig().blocks(12)) == (9, 6)
    weights = [resolved("seed").repa.weight_at(step, 6000) for step in (0, 3000, 5999)]
    assert weights == [0.5, 0.5, 0.5]


def test_muon_has_the_constants_of_the_text():
    config = OptimizerConfig()
    assert (config.type, config.muon_momentum, config.muon_nesterov, config.muon_ns_steps) == ("muon", 0.95, True, 5)
    assert config.muon_adjust_lr == "match_rms_adamw"
    assert config.muon_lr_factor == 1.0
    assert (config.weight_decay, config.betas, config.eps) == (0.0, [0.9, 0.95], 1e-8)  # torch's Muon decays by .1
    for wrong in ({"muon_momentum": 1.0}, {"muon_ns_steps": 0}, {"betas": [0.9]}, {"betas": [0.9, 0.95, 0.99]}):
        with pytest.raises(ValidationError):
            OptimizerConfig(**wrong)
    assert update_scale(768, 2048, config.muon_adjust_lr) == pytest.approx(0.2 * math.sqrt(2048))
    assert NS_COEFFICIENTS == (3.4445, -4.7750, 2.0315)


def test_the_average_forgets_as_it_says():
    decays = [ema_decay(step, 6000, 0.9999, 500) for step in (500, 501, 6000)]
    assert decays == [0.0, 0.9999, 0.9999]
    assert ema_decay(7, 10**9, None) == pytest.approx(1 - 8 ** (-2 / 3)) == pytest.approx(0.75)
    assert ema_decay(10**6, 1000, None) == 0.99  # at most 1 - 10 / steps
    assert TrainSection().ema_decay is None
    assert (EmaConfig().snapshots, EmaConfig().sigma_rel) == (0, [0.05, 0.1])
    for few in (1, 7):
        with pytest.raises(ValidationError):
            EmaConfig(snapshots=few)
    assert EmaConfig(snapshots=8).snapshots == 8


def test_checkpoints_are_written_every_500_steps():
    assert CheckpointSection().every_steps == 500
    assert resolved("base").checkpoint.every_steps == 500


def test_times_are_embedded_at_a_thousand_times_their_value():
    embedding = TimestepEmbedding(8)
    embedding.mlp = torch.nn.Identity()
    t = torch.tensor([0.5, 0.5 + math.pi / 1000])
    first, second = embedding(t)
    assert len(first) == 256
    assert first[0].item() == pytest.approx(math.cos(500), abs=1e-4)  # the highest frequency is 1
    assert second[0].item() == pytest.approx(-math.cos(500), abs=1e-3)
    assert first[127].item() == pytest.approx(math.cos(500 / 10_000 ** (127 / 128)), abs=1e-4)


# The data


def test_seven_buckets_of_about_a_megapixel():
    assert set(buckets_for(1024)) == {
        Bucket(1024, 1024), Bucket(1216, 832), Bucket(832, 1216), Bucket(1280, 768), Bucket(768, 1280),
        Bucket(1344, 704), Bucket(704, 1344),
    }  # fmt: skip
    assert PrepConfig(source="a", output="b").base == 1024
    nearest = {
        (4000, 4000): (1024, 1024),
        (3000, 2000): (1216, 832),
        (1920, 1080): (1280, 768),
        (1000, 2000): (704, 1344),
    }
    assert {size: choose_bucket(*size, 1024) for size in nearest} == {a: Bucket(*b) for a, b in nearest.items()}


def test_captions_are_gemmas_with_150_to_200_words():
    config = CaptionConfig()
    assert config.model == "gemma3:27b"
    prompt = Path("prep/captions/caption_prompt.txt").read_text(encoding="utf-8")
    assert "150 to 200 words" in prompt
    assert re.search(r"Do not interpret, judge or guess", prompt)
    assert (config.min_words, config.max_words) == (60, 300)
    assert load_config(PrepConfig, "configs/prep/seed.yaml").captions.backend == "ollama"


def test_encoders_are_those_of_the_text():
    models = {name: layer.encoder.model for name, layer in LAYERS.items() if layer.encoder}
    assert models["t5"] == "google-t5/t5-large"
    assert models["dino"] == "facebook/dinov3-vitl16-pretrain-lvd1689m"
    assert set(LAYERS["pose"].encoder.files) == {"detector", "pose"}
    config = load_config(PrepConfig, "configs/prep/seed.yaml")
    assert config.t5.max_tokens == 512
    assert (config.flips, config.dino.input_scale) == (True, 1.0)  # 64 x 64 = 4,096 patches of a square crop
    assert resolved("seed").model.context_patches is None


def test_a_person_has_133_joints_of_which_those_below_a_confidence_of_5_percent_are_null():
    assert JOINTS == 133 == 17 + 6 + 68 + 42
    assert BODY_JOINTS == 17
    assert NULL_JOINT_CONFIDENCE == 0.05


# What is watched


def test_memory_is_logged_under_the_tags_of_the_text(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name, value in {"max_memory_allocated": 3e9, "memory_allocated": 1e9, "memory_reserved": 2e9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert tracking.gpu_memory(torch.device("cuda")) == {
        "memory/peak_vram_gb": 3.0, "memory/vram_allocated_gb": 1.0, "memory/vram_reserved_gb": 2.0,
    }  # fmt: skip


# The ablation


@pytest.mark.parametrize("name", ["ablation", "ablation-photos"])
def test_the_arms_add_tread_then_muon_then_repa(name):
    sweep = load_sweep(Path(f"configs/sweep/{name}.yaml"))
    configs = {trial.arm.name: trial.config for trial in sweep.trials}
    on = {arm: (c.tread.enabled, c.optimizer.type, c.repa.enabled) for arm, c in configs.items() if arm in "ABCD"}
    assert on == {
        "A": (False, "adamw", False), "B": (True, "adamw", False),
        "C": (True, "muon", False), "D": (True, "muon", True),
    }  # fmt: skip
    assert {c.train.lr for c in configs.values()} == ({3e-4} if name == "ablation-photos" else {3e-4, 1e-3})
    assert {c.train.steps for c in configs.values()} == {5000 if name == "ablation-photos" else 2000}


# All of it at once


@pytest.mark.slow
def test_the_recipe_runs_resumes_validates_and_reports(
    figures_config, without_ray, random_alexnet, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(random_alexnet))
    prepare(figures_config.model_copy(update={"output": str(tmp_path / "dataset"), "flips": True}))
    small = (
        "model.hidden_size=64", "model.depth=4", "model.num_heads=2", "model.patch_size=4",
        "train.steps=20", "train.grad_accumulation_steps=4", "train.warmup=5", "train.ema_warmup=5",
        "train.phases=[{until_step: 8, scale: 0.5}, {until_step: 20, scale: 1.0}]", "train.device=cpu",
        "checkpoint.every_steps=4", "visual_debug.every_steps=10", "visual_debug.steps=2", "validation.every_steps=10",
        "validation.samples=4",
    )  # fmt: skip
    places = [f"dataset={tmp_path / 'dataset'}", f"output={tmp_path / 'run'}"]
    command = ["run", "--config", "configs/train/seed-baseline.yaml", *places, *small]
    with monkeypatch.context() as patch:
        patch.setattr(VisualDebug, "draw", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
        assert train_main(command) == 75
    assert train_main(command) == 0
    assert re.search("continuing from .*step-000010", capsys.readouterr().out)

    run = tmp_path / "run"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == list(range(1, 21))
    last = logged[-1]
    assert last["train/ema_decay"] == 0.9999
    assert {"train/repa_loss", "sys/active_tokens", "validation/heldout_loss"} <= last.keys()
    assert "validation/reconstruction/lpips" in last
    assert {key for key in last if key.startswith(("validation/swap", "validation/edit"))}
    assert (run / "visual_debug" / "step-000020" / "grid.png").exists()
    metrics = json.loads((run / "validation_outputs" / "step-000020-dev" / "report.json").read_text())["metrics"]
    assert {metric["settings"]["guidance"] for metric in metrics if metric["name"] == "edit/effect"} == {"self=3"}
    assert evaluate_main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert "self-guidance 3" in (tmp_path / "report.html").read_text(encoding="utf-8")

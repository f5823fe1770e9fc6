"""REPA: the formula, whose tokens meet whose, which images count, and that it leaves when its time is over."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nanodit.config import load_config
from nanodit.errors import ConfigError
from tests.train.loop.test_trainer import logged, make, weights_of
from tests.train.tiny import write_dataset
from train.checkpoint.checkpoint import load_checkpoint
from train.checkpoint.open import load_model
from train.config import TrainConfig
from train.loop.announce import announce
from train.method.dropout import ConditioningConfig
from train.method.ema import averaged
from train.method.flow import interpolate
from train.method.repa import RepaConfig, RepaHead, RepaLoss, alignment_loss, alignment_values, counted_share, resample
from train.model.network import TRAINING_ONLY

ON = ("repa.enabled=true",)
ROUTED = ("tread.enabled=true", "tread.start=0", "tread.end=-1")


def test_the_weight_falls_linearly_and_ends():
    repa = RepaConfig(enabled=True, weight=0.5, until=0.5)
    assert [repa.weight_at(step, 100) for step in (0, 25, 49, 50, 99)] == pytest.approx([0.5, 0.25, 0.01, 0, 0])
    assert RepaConfig().weight_at(0, 100) == 0


@pytest.mark.parametrize("wrong", [{"until": 1.1}, {"until": 0.0}, {"block_index": -2}, {"width": 0}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValidationError):
        RepaConfig(**wrong)


def test_the_head_starts_with_weights_and_without_biases():
    torch.manual_seed(0)
    head = RepaHead(RepaConfig(width=1), 4, 32, 64)
    assert head.blocks == 2
    for parameter in head.parameters():
        assert parameter.any() == (parameter.ndim == 2)
        assert parameter.abs().max() <= (math.sqrt(6 / sum(parameter.shape)) if parameter.ndim == 2 else 0)


@pytest.mark.parametrize(
    ("schedule", "words"), [("linear", "falling to 0 at step 50"), ("constant", "constant until step 50")]
)
def test_a_run_says_how_long_and_how_strongly(schedule, words):
    repa = RepaConfig(enabled=True, schedule=schedule)
    table = ConditioningConfig(preset="seed").resolve()
    head = RepaHead(repa, 4, 32, 64)
    (said,) = RepaLoss(repa, head, 64, 4, table).announce(100, {})
    assert said == f"repa: weight 0.5 on the 45% of the images whose patches are dropped, so 0.225 an image, {words}"


def test_a_constant_weight_stays_until_it_ends():
    repa = RepaConfig(enabled=True, weight=0.5, schedule="constant", until=0.5)
    assert [repa.weight_at(step, 100) for step in (0, 25, 49, 50, 99)] == [0.5, 0.5, 0.5, 0, 0]
    assert RepaConfig(enabled=True, schedule="constant", until=1.0).weight_at(99, 100) == 0.5


def test_the_state_is_taken_after_half_of_the_blocks_or_as_many_as_one_says():
    assert [RepaConfig().blocks(depth) for depth in (1, 2, 12, 18)] == [1, 1, 6, 9]
    assert RepaConfig(block_index=4).blocks(12) == 4
    for wrong in (0, 13):
        with pytest.raises(ConfigError, match=f"repa.block_index {wrong}: .*from 1 to 12"):
            RepaConfig(block_index=wrong).blocks(12)
    with pytest.raises(ConfigError, match="block_index 13"):
        load_config(TrainConfig, "configs/train/base.yaml", ["repa.block_index=13"])


# Whose tokens meet whose


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (3, 4), (8, 12), (5, 7)])
def test_trap_17_the_teacher_is_averaged_over_area_in_both_directions(grid):
    patches = torch.randn(2, 4, 6, 5)
    result = resample(patches, *grid)
    for row, column in np.ndindex(grid):
        y, x = (
            slice(math.floor(i * size / cells), math.ceil((i + 1) * size / cells))
            for i, size, cells in ((row, 4, grid[0]), (column, 6, grid[1]))
        )
        expected = patches[:, y, x].mean((1, 2))
        torch.testing.assert_close(result[:, row * grid[1] + column], expected)  # trap 17


def test_the_loss_is_one_minus_the_mean_cosine():
    projected, teacher = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    p, q = projected.double().numpy(), teacher.double().numpy()
    cosine = (p * q).sum(2) / np.linalg.norm(p, axis=2) / np.linalg.norm(q, axis=2)
    loss = alignment_loss(projected, teacher, torch.tensor([False, True, False]), None)
    np.testing.assert_allclose(loss, (1 - cosine.mean(1)) * [1, 0, 1], atol=1e-6)
    assert alignment_loss(teacher, 3 * teacher, torch.zeros(3, dtype=torch.bool), None).abs().max() < 1e-6


def test_kept_tokens_meet_the_teacher_at_their_own_places():
    teacher, keep_ids = torch.randn(2, 6, 5), torch.tensor([[0, 2, 5], [1, 2, 3]])
    own = torch.stack([teacher[i, keep_ids[i]] for i in range(2)])
    nobody = torch.zeros(2, dtype=torch.bool)
    assert alignment_loss(own, teacher, nobody, keep_ids).abs().max() < 1e-6
    assert alignment_loss(teacher[:, :3], teacher, nobody, keep_ids).min() > 0.1


@pytest.mark.parametrize(("block", "tokens"), [(1, 16), (2, 4), (3, 4), (4, 16)])
def test_a_routed_state_is_projected_before_the_others_come_back(tiny_dataset, tmp_path, block, tokens):
    overrides = ("model.depth=4", "tread.enabled=true", "tread.keep=0.25", f"repa.block_index={block}", *ON)
    trainer = make(tiny_dataset, tmp_path / "run", *overrides)
    model, seen = trainer.model, []
    _unfreeze(model)
    model.blocks[block - 1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    keep_ids = torch.tensor([[1, 5, 6, 15]])
    conditions = trainer.batches.make(0).groups[0].conditions.select(slice(0, 1))
    output, projected = model(torch.randn(1, 3, 32, 32), torch.rand(1), conditions, keep_ids, project=True)
    assert projected.shape == (1, tokens, 16)
    torch.testing.assert_close(projected, model.repa_head(seen[0]))
    assert output.shape == (1, 3, 32, 32)


# Which images count


def test_the_effective_weight_is_the_share_of_images_without_patches():
    table = ConditioningConfig(preset="default").resolve()
    assert counted_share(table) == pytest.approx(0.66)
    everything, text = frozenset({"text", "cls", "patches", "pose"}), frozenset({"text"})
    values = alignment_values(0.3, 0.5, [everything, text, text, everything])
    assert values == pytest.approx({"train/repa_loss": 0.6, "train/repa_weight": 0.25})
    assert alignment_values(0.0, 0.5, [everything]) == {}
    assert alignment_values(0.0, 0.0, [text]) == {}


@pytest.mark.parametrize("routing", [(), ROUTED])
def test_an_image_counts_once_where_it_drops_its_patches_and_else_not_at_all(tiny_dataset, tmp_path, routing):
    trainer = make(tiny_dataset, tmp_path / "run", *ON, *routing, "conditioning.preset=default", "train.batch_size=12")
    _unfreeze(trainer.model)
    batches = [trainer.batches.make(i) for i in range(2)]
    for batch in batches:
        values = trainer.micro_step(batch)
        assert [bool(value) for value in values["repa"]] == ["patches" not in subset for subset in batch.subsets]
        assert values["flow"].all()
    head = {name: p.grad.clone() for name, p in trainer.model.repa_head.named_parameters()}
    trainer.model.zero_grad()
    for batch in batches:
        for part in batch.groups:
            assert ("teacher" not in part.prepared) == all("patches" in subset for subset in batch.subsets[part.images])
            for i in range(part.images.start, part.images.stop):
                if "patches" in batch.subsets[i]:
                    continue
                one, inside = slice(i, i + 1), slice(i - part.images.start, i - part.images.start + 1)
                keep_ids = None if batch.keep_ids is None else batch.keep_ids[one]
                z = interpolate(batch.x[one], batch.noise[one], batch.t[one])
                conditions = part.conditions.select(inside).keeping(batch.subsets[one])
                _, projected = trainer.model(z, batch.t[one], conditions, keep_ids, project=True)
                teacher = part.prepared["teacher"][inside]
                teacher = teacher if keep_ids is None else teacher[:, keep_ids[0]]
                cosine = torch.nn.functional.cosine_similarity(projected, teacher, dim=2).mean()
                (0.5 * (1 - cosine) / 24).backward()
    for name, parameter in trainer.model.repa_head.named_parameters():
        torch.testing.assert_close(head[name], parameter.grad, rtol=2e-3, atol=2e-6)


def test_a_fully_conditioned_batch_has_no_weight_and_costs_nothing(tiny_dataset, tmp_path):
    table = "conditioning.table={all: 0.9, text: 0.1}"
    trainer = make(tiny_dataset, tmp_path / "run", *ON, "conditioning.preset=null", table)
    batch = next(b for b in map(trainer.batches.make, range(9)) if all("patches" in subset for subset in b.subsets))
    assert all("teacher" not in part.prepared for part in batch.groups)
    assert not trainer.micro_step(batch)["repa"].any()
    assert all(parameter.grad is None for parameter in trainer.model.repa_head.parameters())


def test_the_teacher_lies_on_the_token_grid(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", *ON, "model.patch_size=4")
    for batch in map(trainer.batches.make, range(6)):
        height, width = batch.x.shape[2] // 4, batch.x.shape[3] // 4
        for part in batch.groups:
            if "teacher" in part.prepared:
                assert part.prepared["teacher"].shape == (part.images.stop - part.images.start, height * width, 16)


def test_nothing_to_align_with_is_refused(tiny_dataset, tmp_path):
    plain = write_dataset(tmp_path / "dataset", layers=("px", "text", "t5"))
    with pytest.raises(ConfigError, match="the dataset has no DINO patches"):
        make(plain, tmp_path / "run", *ON)
    with pytest.raises(ConfigError, match="keeps the patches of every image"):
        make(tiny_dataset, tmp_path / "run", *ON, "conditioning.preset=null", "conditioning.table={all: 1}")


# What a run does with it


def test_off_has_no_head_and_no_teacher(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "train.steps=1")
    assert trainer.model.repa_head is None
    assert all("teacher" not in part.prepared for part in trainer.batches.make(0).groups)
    trainer.run()
    assert not [key for key in logged(tmp_path / "run")[0] if "repa" in key]


def test_it_ends_on_time_is_resumed_exactly_and_leaves_a_model_to_sample_from(tiny_dataset, tmp_path, capsys):
    overrides = (*ON, *ROUTED, "train.gradient_checkpointing=true", "ema.snapshots=8")
    trainer = make(tiny_dataset, tmp_path / "straight", *overrides)
    announce(trainer)
    assert "repa: weight 0.5 on the 75% of the images" in capsys.readouterr().out
    trainer.run()
    records = logged(tmp_path / "straight")
    assert ["train/repa_loss" in record for record in records] == [True] * 6 + [False] * 6
    for i, record in enumerate(records[:6]):
        assert record["train/repa_weight"] == pytest.approx(0.5 * (1 - i / 6) * 0.75)  # 8 images: 2 of `all`
        repa = record["train/repa_weight"] * record["train/repa_loss"]
        assert record["train/loss"] == pytest.approx(record["train/flow_loss"] + repa)
    assert all(record["train/loss"] == record["train/flow_loss"] for record in records[6:])
    assert any("teacher" in part.prepared for i in (10, 11) for part in trainer.batches.make(i).groups)
    assert all("teacher" not in part.prepared for i in range(12, 24) for part in trainer.batches.make(i).groups)

    checkpoints = {
        step: load_checkpoint(tmp_path / "straight" / "checkpoints" / f"step-{step:06d}") for step in (6, 12)
    }
    head = [name for name in checkpoints[6].model if name.startswith(TRAINING_ONLY)]
    assert len(head) == 6
    for name in head:  # nothing of it is computed in the second half
        assert torch.equal(checkpoints[6].model[name], checkpoints[12].model[name])
        assert name not in checkpoints[12].ema
    assert set(checkpoints[12].ema) == set(averaged(trainer.model))
    for weights in ("ema", "model"):
        model, _, _ = load_model(tmp_path / "straight", weights)
        assert model.repa_head is None
    assert trainer.ema_model().repa_head is None

    make(tiny_dataset, tmp_path / "run", *overrides).run()
    again = make(tiny_dataset, tmp_path / "run", *overrides)
    again.load(load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000003"))
    again.run()
    assert weights_of(tmp_path / "run", 12) == weights_of(tmp_path / "straight", 12)  # trap 30
    assert logged(tmp_path / "run") == records


def test_the_other_weights_start_as_they_do_without_it(tiny_dataset, tmp_path):
    plain, on = make(tiny_dataset, tmp_path / "run"), make(tiny_dataset, tmp_path / "run", *ON)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(on.model.state_dict()[name], value)
    assert {p.optimizer_group for p in on.model.repa_head.parameters()} == {"adamw"}


def test_the_head_is_three_layers_with_silu():
    head = RepaHead(RepaConfig(width=8), depth=2, hidden_size=4, features=3)
    x = torch.randn(2, 5, 4)
    (a, b), (c, d), (e, f) = ((layer.weight, layer.bias) for layer in head.mlp if hasattr(layer, "weight"))
    silu = torch.nn.functional.silu
    torch.testing.assert_close(head(x), silu(silu(x @ a.T + b) @ c.T + d) @ e.T + f)
    assert RepaHead(RepaConfig(), 2, 4, 3).mlp[0].out_features == 8


def _unfreeze(model: torch.nn.Module) -> None:
    """Move the zero-initialised layers away from zero, so that gradients reach every parameter."""
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=rng)

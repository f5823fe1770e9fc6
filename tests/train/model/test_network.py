"""NanoDiT: identity at initialisation, everything learns, padding and dropped conditions change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.method.optim import OptimizerConfig, build_optimizer
from train.model.conditions import collate
from train.model.config import ModelConfig
from train.model.layers import grid_positions, rope, rotate
from train.model.modalities import MODALITIES, Features, Grid, _cells, _pose_tokens
from train.model.network import build_model

FEATURES = Features(base=32, widths={"text": 16, "cls": 8, "patches": 8, "pose": 3})


def make_model(features=FEATURES, **overrides):
    torch.manual_seed(0)
    return build_model(
        ModelConfig(**{"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "bottleneck": 16} | overrides),
        features,
    )


def randomised(model, std=0.1):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def conditions(count=2, tokens=(5, 9), grid=(4, 4), seed=0):
    rng = np.random.default_rng(seed)
    pose = rng.uniform(-1, 1, (count, 133, 3)).astype(np.float32)
    pose[..., 2] = rng.uniform(0.1, 1, (count, 133))
    return collate(
        text=[rng.standard_normal((tokens[i % len(tokens)], 16)) for i in range(count)],
        cls=[rng.standard_normal(8) for _ in range(count)],
        patches=[rng.standard_normal((*grid, 8)) for _ in range(count)],
        pose=list(pose),
        count=count,
    )


def test_trap_11_every_block_is_the_identity_at_initialisation():
    model = make_model()
    captured = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: captured.append((inputs[0], output)))
    output = model(torch.randn(2, 3, 32, 32), torch.rand(2), conditions())
    assert len(captured) == 2
    for before, after in captured:
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert output.abs().max() == 0


@pytest.mark.parametrize("absent", [(), ("pose",), ("text",), ("cls", "patches")])
def test_a_modality_that_the_data_lacks_changes_no_weight(absent, monkeypatch):
    """So old checkpoints fit, and a run begins as it did before somebody added a modality."""
    features = Features(32, {name: width for name, width in FEATURES.widths.items() if name not in absent})
    before = make_model(features).state_dict()
    own = {"text": {"text", "text_order"}, "pose": {"pose", "pose_position", "joint", "null_joint", "no_person"}}
    own |= {"cls": {"cls", "cls_to_adaln", "null_cls_to_adaln"}, "patches": {"patches"}}
    parts = {name.split(".")[1] for name in before if name.startswith("context.")}
    assert parts == {"null", "role"}.union(*(own[name] for name in features.modalities))
    assert before["context.null"].shape == before["context.role"].shape == (4, 32)
    monkeypatch.setitem(MODALITIES, "depth", replace(MODALITIES["patches"], name="depth", layer="depth"))
    after = make_model(features).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_trap_12_final_layer_moves_first_and_everything_within_four_steps(optimizer):
    model = make_model(output_conv=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optim = build_optimizer(model, OptimizerConfig(type=optimizer))
    optim.set_lr(1e-2)
    every = conditions(4)
    pose = every.pose.clone()
    pose[0, :, 2] = 0  # nobody in the first image, some joints not found in the others
    pose[1:, :20, 2] = 0
    mixed = [
        frozenset({"pose", "text"}),
        frozenset(),
        frozenset({"text", "cls", "patches", "pose"}),
        frozenset({"cls"}),
    ]
    batch = every.replace(pose=pose).keeping(mixed)
    for step in range(4):
        loss = (model(torch.randn(4, 3, 32, 32), torch.rand(4), batch) - torch.randn(4, 3, 32, 32)).square().mean()
        loss.backward()
        optim.step()
        optim.zero_grad()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        if step == 0:
            assert {"final.weight", "final.bias"} <= moved
    assert moved == set(before)


def test_padding_the_text_changes_nothing():
    model = randomised(make_model())
    batch = conditions(2, (5, 9))
    padded = batch.replace(
        text=torch.cat((batch.text, torch.randn(2, 32, 16)), 1),
        text_mask=torch.cat((batch.text_mask, torch.zeros(2, 32, dtype=torch.bool)), 1),
    )
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    torch.testing.assert_close(model(z, t, batch), model(z, t, padded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("subset", [(), ("text",), ("text", "pose"), ("cls",), ("patches", "pose")])
def test_trap_14_a_dropped_condition_is_one_null_token_and_leaks_nothing(subset):
    model = randomised(make_model())
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    context = model.encode_context(conditions().keeping(subset), 32, 32)
    full = {"text": 32, "cls": 1, "patches": 16, "pose": 133}
    lengths = [sum({**full, "text": text}[name] if name in subset else 1 for name in full) for text in (5, 9)]
    assert context.spans.lengths == tuple(lengths)  # of a caption's tokens those that are real
    assert context.tokens.shape[0] == sum(lengths)
    # other values of what is dropped make no difference, neither alone nor beside an image that keeps everything
    others = conditions(seed=7)
    everything = frozenset(full)
    results = []
    for batch in (conditions(), others):
        swapped = batch.replace(**{name: getattr(conditions(), name) for name in subset}, text_mask=batch.text_mask)
        alone = model(z, t, swapped.keeping(subset))
        mixed = model(z, t, swapped.keeping([frozenset(subset), everything]))
        torch.testing.assert_close(alone[:1], mixed[:1], atol=1e-5, rtol=1e-5)
        results.append(alone)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_no_person_differs_from_a_dropped_pose():
    model = randomised(make_model())
    batch = conditions()
    nobody = batch.replace(pose=torch.zeros_like(batch.pose))
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    assert not torch.allclose(model(z, t, nobody), model(z, t, nobody.keeping({"text", "cls", "patches"})), atol=1e-4)


def test_coordinates_of_joints_not_found_are_ignored():
    model = randomised(make_model())
    batch = conditions()
    pose = batch.pose.clone()
    pose[:, 10:20, 2] = 0.04
    elsewhere = pose.clone()
    elsewhere[:, 10:20, :2] += 0.5
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    outputs = [model(z, t, batch.replace(pose=joints)) for joints in (pose, elsewhere)]
    torch.testing.assert_close(*outputs)


def test_trap_13_patches_and_joints_know_where_they_are():
    model = randomised(make_model(), std=0.3)
    batch = conditions()
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    flipped = batch.replace(patches=batch.patches.flip(2))
    moved = batch.replace(pose=batch.pose * torch.tensor([-1.0, 1.0, 1.0]))
    reordered = batch.replace(text=batch.text[:, :5].flip(1), text_mask=batch.text_mask[:, :5])
    reference = batch.replace(text=batch.text[:, :5], text_mask=batch.text_mask[:, :5])
    for one, other in ((batch, flipped), (batch, moved), (reference, reordered)):
        assert not torch.allclose(model(z, t, one), model(z, t, other), atol=1e-4)


def test_trap_13_joints_carry_fourier_features_of_their_place():
    model = randomised(make_model(context_joints=17)).context
    torch.nn.init.zeros_(model.pose[-1].weight)  # what the MLP sees of x and y is left out
    pose = conditions().pose[:, :17]
    tokens = _pose_tokens(model, pose, Grid(4, 4, 8.0)).x
    angles = pose[..., :2].unsqueeze(3) * torch.pi * torch.tensor([0.5, 1, 2, 4, 8, 16])
    features = torch.cat((angles.cos().flatten(2), angles.sin().flatten(2)), 2)  # x and then y, from slow to fast
    expected = features @ model.pose_position.weight.T + model.joint + model.pose[-1].bias
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_trap_13_a_joint_lies_on_the_image_tokens_axes():
    rows, columns = 4, 6
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, columns)), indexing="ij")
    batch = conditions(1)
    pose = batch.pose.clone()
    pose[0, : rows * columns] = torch.stack((x, y, torch.ones_like(x)), -1).flatten(0, 1)  # one in each cell's centre
    encode = make_model(context_joints=rows * columns).context
    _, positions, _, _ = encode(batch.replace(pose=pose), rows, columns, 8.0)
    torch.testing.assert_close(positions[-rows * columns :], grid_positions(rows, columns, 8.0))


def test_context_grid_lies_on_the_image_tokens_axes():
    same = _cells((4, 6), 4, 6, 8.0, torch.device("cpu"))
    torch.testing.assert_close(same, grid_positions(4, 6, 8.0))
    coarse = _cells((2, 3), 4, 6, 8.0, torch.device("cpu")).view(2, 3, 2)
    fine = grid_positions(4, 6, 8.0).view(4, 6, 2)
    torch.testing.assert_close(coarse[0, 0], fine[:2, :2].mean((0, 1)))


def test_positions_are_unit_spaced_at_the_base_and_scale_with_resolution():
    base = grid_positions(8, 8, 8.0)
    assert base.view(8, 8, 2)[0, :, 1].diff().tolist() == pytest.approx([1.0] * 7)
    double = grid_positions(16, 16, 8.0)
    assert double.abs().max() == pytest.approx(3.75)
    assert base.sum().abs() < 1e-5


def test_trap_20_positions_are_made_once_for_each_shape(monkeypatch):
    made = []
    monkeypatch.setattr("train.model.network.grid_positions", lambda *of: made.append(of[:2]) or grid_positions(*of))
    model, batch = make_model(), conditions()
    for height, width in ((32, 32), (32, 48), (32, 32), (32, 48)):
        model(torch.randn(2, 3, height, width), torch.rand(2), batch)
    assert made == [(4, 4), (4, 6)]


def test_rotary_scores_depend_on_relative_position_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a, b):
        return (rotate(q, *rope(torch.tensor([[a]]), 16)) * rotate(k, *rope(torch.tensor([[b]]), 16))).sum()

    torch.testing.assert_close(score((1.0, 2.0), (0.5, -1.0)), score((3.0, 5.0), (2.5, 2.0)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score((1.0, 2.0), (0.5, -1.0)), score((2.0, 1.0), (-1.0, 0.5)))


def test_any_aspect_ratio_and_resolution_runs():
    model = randomised(make_model())
    for height, width in ((32, 32), (24, 40), (64, 16)):
        assert model(torch.randn(2, 3, height, width), torch.rand(2), conditions()).shape == (2, 3, height, width)


def test_cached_context_gives_the_same_prediction():
    model = randomised(make_model())
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    context = model.encode_context(conditions(), 32, 32, cache=True)
    torch.testing.assert_close(model(z, t, conditions()), model(z, t, context))


def test_gradient_checkpointing_changes_no_gradient():
    z, t, batch = torch.randn(2, 3, 32, 32), torch.rand(2), conditions()
    gradients = []
    for every in (0, 1, 2):
        model = randomised(make_model()).train()
        model.checkpoint_every = every
        model(z, t, batch).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, gradients[2][name], rtol=1e-6, atol=1e-6)


def test_pooled_patch_context_is_bounded():
    model = make_model(context_patches=6)
    context = model.encode_context(conditions(grid=(4, 8)), 32, 32)
    assert context.spans.lengths == (5 + 1 + 133 + 3, 9 + 1 + 133 + 3)  # 1 x 3 cells: both sides rounded down


@pytest.mark.slow
def test_trap_21_compiling_keeps_the_names_and_the_result():
    model = randomised(make_model(depth=1))
    names = [name for name, _ in model.named_parameters()]
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    expected = model(z, t, conditions())
    model.compile_blocks()
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(z, t, conditions()), expected, atol=1e-4, rtol=1e-4)

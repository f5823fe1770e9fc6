"""Routing: kept tokens see only kept ones, the others come back untouched, and which is which is a pure function."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nanodit.config import load_config
from nanodit.errors import ConfigError
from nanodit.rng import generator
from prep.dataset.reader import Dataset
from tests.train.loop.test_trainer import logged, make, weights_of
from tests.train.model.test_network import FEATURES, conditions, randomised
from train.__main__ import main
from train.checkpoint.checkpoint import load_checkpoint
from train.checkpoint.open import load_model
from train.config import TrainConfig
from train.loop.announce import announce
from train.model.attend import Seen
from train.model.config import ModelConfig
from train.model.layers import grid_positions, rope
from train.model.network import build_model
from train.model.tread import TreadConfig, draw_keep_ids, put_back, take

ROUTED = ("tread.enabled=true", "tread.start=0", "tread.end=-1")


def make_model(depth=4, **tread):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, depth=depth, num_heads=2, patch_size=8, bottleneck=16)
    return randomised(build_model(config, FEATURES, TreadConfig(enabled=True, **tread)))


def some_ids(count=2, tokens=24, kept=12):
    return torch.from_numpy(np.stack([draw_keep_ids(generator("test", i), tokens, kept) for i in range(count)]))


def inputs(count=2, height=32, width=48):
    torch.manual_seed(2)
    return torch.randn(count, 3, height, width), torch.rand(count), conditions(count)


def blocks_seen(model, *arguments):
    """What goes into each block and what comes out."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append((args, out))) for block in model.blocks]
    output = model(*arguments)
    for hook in hooks:
        hook.remove()
    return output, seen


# Which blocks, which steps, which tokens


def test_trap_26_negative_blocks_count_from_the_end():
    assert TreadConfig().route(12) == range(0)
    assert TreadConfig(enabled=True).route(12) == range(1, 11)  # 1 .. depth - 2, both inclusive
    assert TreadConfig(enabled=True, start=-3, end=-1).route(12) == range(9, 12)
    assert TreadConfig(enabled=True, start=4, end=4).route(12) == range(4, 5)
    for start, end, depth in ((1, -2, 2), (0, 12, 12), (-13, 3, 12), (5, 4, 12)):
        with pytest.raises(ConfigError, match=r"tread\.start and tread\.end"):
            TreadConfig(enabled=True, start=start, end=end).route(depth)


def test_no_block_to_route_is_refused_with_the_config(tmp_path):
    with pytest.raises(ConfigError, match="start 1 and end -2 are blocks 1 to 0, of 2"):
        load_config(TrainConfig, "configs/train/base.yaml", ["tread.enabled=true", "model.depth=2"])


def test_the_last_steps_are_dense_but_for_some_micro_batches():
    tread = TreadConfig(enabled=True)
    routed = np.array([[tread.routes(step, 800, generator(step, i)) for i in range(8)] for step in range(800)])
    assert routed[:700].all()
    assert routed[700:].mean() == pytest.approx(0.1, abs=0.04)  # 800 draws: four standard deviations
    assert all(TreadConfig(enabled=True, dense_tail=0).routes(step, 800, None) for step in (0, 799))
    assert not TreadConfig().routes(0, 800, None)


def test_kept_tokens_are_as_many_for_every_image_and_equally_likely():
    tread = TreadConfig(keep=0.5)
    assert [tread.kept(n) for n in (1024, 9, 1)] == [512, 4, 1]
    drawn = np.stack([draw_keep_ids(generator("law", i), 16, 4) for i in range(4000)])
    assert drawn.shape == (4000, 4)
    assert (np.diff(drawn, axis=1) > 0).all()  # sorted, none twice
    assert drawn.min() >= 0
    share = np.bincount(drawn.ravel(), minlength=16) / 4000
    np.testing.assert_allclose(share, 0.25, atol=0.028)  # four standard deviations


# What a routed forward computes


def test_every_image_of_a_step_has_tokens_of_its_own(tiny_dataset, tmp_path):
    batches = make(tiny_dataset, tmp_path / "run", "tread.enabled=true", "tread.start=0", "tread.end=-1").batches
    for step in range(3):
        drawn = [ids for number in batches.plan.numbers(step) for ids in batches.make(number).keep_ids]
        assert len({tuple(ids.tolist()) for ids in drawn}) == len(drawn) == 8


def test_take_and_put_back_are_indexing():
    x, ids = torch.randn(2, 24, 8), some_ids()
    kept = take(x, ids)
    for i in range(2):
        assert torch.equal(kept[i], x[i, ids[i]])
    new = torch.randn_like(kept)
    result = put_back(x, new, ids)
    for i in range(2):
        dropped = [n for n in range(24) if n not in ids[i].tolist()]
        assert torch.equal(result[i, ids[i]], new[i])
        assert torch.equal(result[i, dropped], x[i, dropped])


def test_routed_blocks_are_the_blocks_on_the_kept_tokens_alone():
    model, ids = make_model(), some_ids()
    assert model.route == range(1, 3)
    z, t, given = inputs()
    _, seen = blocks_seen(model, z, t, given, ids)
    assert [args[0].shape[1] for args, _ in seen] == [24, 12, 12, 24]
    before = seen[0][1]
    positions = grid_positions(4, 6, model.base_grid)
    for image in range(2):
        one = slice(image, image + 1)
        context = model.encode_context(given.select(one), 32, 48)
        x = before[one][:, ids[image]]
        wave = rope(positions[ids[image]].unsqueeze(1), 16)
        for block in model.blocks[1:3]:
            modulation = seen[1][0][1][one]
            x = block(x, modulation, wave, (context.tokens, context.cos, context.sin), Seen())
        torch.testing.assert_close(seen[3][0][0][one][:, ids[image]], x, atol=1e-5, rtol=1e-5)


def test_dropped_tokens_re_enter_exactly():
    ids = some_ids()
    _, seen = blocks_seen(make_model(), *inputs(), ids)
    before, after = seen[0][1], seen[3][0][0]
    for i in range(2):
        dropped = [n for n in range(24) if n not in ids[i].tolist()]
        assert torch.equal(after[i, dropped], before[i, dropped])
        assert not torch.isclose(after[i, ids[i]], before[i, ids[i]]).all(1).any()


def test_kept_tokens_see_only_kept_tokens():
    model, ids = make_model(start=0, end=-1), some_ids()
    z, t, given = inputs()
    dropped = torch.ones(2, 24, dtype=torch.bool).scatter(1, ids, False).view(2, 1, 4, 6)
    pixels = dropped.repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(pixels, torch.randn_like(z), z)
    one, two = model(z, t, given, ids), model(other, t, given, ids)
    kept = ~pixels.expand_as(z)
    assert torch.equal(one[kept], two[kept])
    assert not torch.isclose(one[~kept], two[~kept]).all()
    dense = model(z, t, given), model(other, t, given)
    assert not torch.isclose(dense[0][kept], dense[1][kept]).all()


def test_all_kept_is_dense():
    model = make_model()
    everything = torch.arange(24).expand(2, -1)
    assert torch.equal(model(*inputs(), everything), model(*inputs()))


def test_a_model_without_routed_blocks_refuses_keep_ids():
    with pytest.raises(ValueError, match="without routed blocks"):
        randomised(build_model(ModelConfig(hidden_size=32, depth=2, num_heads=2, patch_size=8), FEATURES))(
            *inputs(), some_ids()
        )


def test_gradients_reach_everything_and_a_recomputed_block_is_the_same():
    ids, gradients = some_ids(), []
    z, t, given = inputs()
    z.requires_grad_()
    for checkpointing in (False, True):
        model = make_model().train()
        model.checkpoint_every = int(checkpointing)
        model(z, t, given, ids).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])
        assert gradient.any() or name.startswith("context"), name  # whose null tokens nobody uses here
    assert (z.grad != 0).all(), "dropped tokens reach the loss past the blocks"


@pytest.mark.slow
def test_compiled_blocks_route_as_well():
    model, ids = make_model(depth=3, start=1, end=1), some_ids()

    def results():
        for keep_ids in (ids, None):
            model.zero_grad()
            output = model(*inputs(), keep_ids)
            output.square().mean().backward()
            yield output, [parameter.grad for parameter in model.parameters()]

    expected = list(results())
    model.compile_blocks()
    torch.testing.assert_close(list(results()), expected, atol=1e-4, rtol=1e-3)


# What a run does with it


def test_a_run_routes_logs_it_and_builds_the_same_model_from_its_checkpoint(tiny_dataset, tmp_path):
    overrides = (*ROUTED, "tread.start=-1", "tread.keep=0.25", "tread.dense_tail=0.25", "tread.tail_routed=0")
    trainer = make(tiny_dataset, tmp_path / "run", *overrides)
    for index in (0, 5):
        ours, theirs = (make(tiny_dataset, tmp_path / "run", *overrides).batches.make(index) for _ in range(2))
        assert torch.equal(ours.keep_ids, theirs.keep_ids)
        assert not torch.equal(ours.keep_ids[0], ours.keep_ids[1]), "per image"
    assert trainer.batches.make(18).keep_ids is None
    trainer.run()
    records = logged(tmp_path / "run")
    assert [record["train/routed"] for record in records] == [1.0] * 9 + [0.0] * 3
    assert np.isfinite([record["train/loss"] for record in records]).all()
    batch = trainer.batches.make(0)
    tokens = batch.x.shape[2] * batch.x.shape[3] // 64
    # block 0 sees all tokens, block 1 a quarter of them
    assert batch.active_tokens(8, len(trainer.model.route) / 2) == 4 * (tokens + round(tokens / 4)) / 2
    model, _, _ = load_model(tmp_path / "run")
    assert model.route == trainer.model.route == range(1, 2)  # trap 26


def test_a_routed_checkpoint_draws_with_self_guidance(tiny_dataset, tmp_path):
    make(tiny_dataset, tmp_path / "run", *ROUTED, "train.steps=2").run()
    key = Dataset(tiny_dataset).rows("holdout")[0]["key"]
    arguments = ["sample", "--checkpoint", str(tmp_path / "run"), "--key", key, "--steps", "2", "--output"]
    assert main([*arguments, str(tmp_path / "plain.png")]) == 0
    assert main([*arguments, str(tmp_path / "guided.png"), "--self-guidance"]) == 0
    plain, guided = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "guided"))
    assert json.loads(guided.text["nanodit"])["self_guidance"] == 3
    assert plain.tobytes() != guided.tobytes()


def test_off_routes_nothing_and_logs_nothing(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "train.steps=1")
    assert trainer.batches.make(0).keep_ids is None
    trainer.run()
    assert not [key for key in logged(tmp_path / "run")[0] if "routed" in key]


def test_few_tokens_are_warned_of(tiny_dataset, tmp_path, capsys):
    announce(make(tiny_dataset, tmp_path / "run", *ROUTED))
    said = capsys.readouterr().out
    assert "warning: tread: routing costs quality below 1024 tokens" in said
    assert "64x64 (64)" in said
    announce(make(tiny_dataset, tmp_path / "fine", *ROUTED, "model.patch_size=1"))
    assert "tread" not in capsys.readouterr().out


def test_trap_30_a_resumed_routed_run_is_the_straight_run(tiny_dataset, tmp_path):
    overrides = (*ROUTED, "tread.dense_tail=0.5", "tread.tail_routed=0.5", "train.gradient_checkpointing=true")
    make(tiny_dataset, tmp_path / "straight", *overrides).run()
    make(tiny_dataset, tmp_path / "run", *overrides).run()
    again = make(tiny_dataset, tmp_path / "run", *overrides)
    again.load(load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000006"))
    again.run()
    assert weights_of(tmp_path / "run", 12) == weights_of(tmp_path / "straight", 12)
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")

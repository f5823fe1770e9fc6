"""Samplers: exact with an oracle after every step, of the stated order on a closed-form Gaussian; and guidance."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nanodit.errors import ConfigError
from train.check.sampling import PSNR, psnr
from train.config import VisualDebugSection
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig, shift, to_x
from train.method.sampling import (
    DRAWING,
    NO_GUIDANCE,
    Guidance,
    Sampling,
    chain,
    guided_denoiser,
    integrate,
    log_snr,
    sample,
    sampling_times,
    to_uint8,
    trajectory_keep_ids,
)
from train.model.conditions import collate, parse_subset
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import build_model
from train.model.tread import TreadConfig

METHODS = ["euler", "heun", "dpm++2m"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("s", [1.0, 3.0])
def test_trap_16_an_oracle_stays_on_the_path_at_every_step(method, s, grid):
    torch.manual_seed(0)
    x, e = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    for steps in range(1, 51):
        seen = []

        def on_step(t, z, seen=seen):
            torch.testing.assert_close(z, (1 - t) * x + t * e, atol=1e-4, rtol=0)
            seen.append(t)

        result = integrate(lambda z, t: x, e, sampling_times(steps, s, grid), method, on_step)
        torch.testing.assert_close(result, x, atol=1e-6, rtol=0)
        assert seen == sampling_times(steps, s, grid)[1:].tolist()


def gaussian_error(method: str, times: np.ndarray, sigma: float = 0.5) -> float:
    """Largest error over all steps against the exact flow of data ~ N(0, sigma^2), where all is linear in z."""

    def spread(t):
        return np.sqrt((1 - t) ** 2 * sigma**2 + t**2)

    def denoise(z, t):  # E[x | z]
        return z * ((1 - t) * sigma**2 / spread(t) ** 2)

    errors = []
    start = torch.full((1, 1, 1, 1), spread(times[0]), dtype=torch.float64)
    integrate(denoise, start, times, method, lambda t, z: errors.append(abs(z.item() - spread(t))))
    assert len(errors) == len(times) - 1
    return max(errors)


def uniform_in_lambda(steps: int) -> np.ndarray:
    """Times from .99 to .01 with equal steps of log((1 - t) / t)."""
    return 1 / (1 + np.exp(np.linspace(log_snr(0.99), log_snr(0.01), steps + 1)))


@pytest.mark.parametrize(
    ("method", "grid", "order"),
    [
        ("euler", lambda steps: sampling_times(steps, 1.0), 1),
        ("euler", lambda steps: sampling_times(steps, 3.0), 1),
        ("heun", lambda steps: sampling_times(steps, 1.0), 2),
        ("heun", lambda steps: sampling_times(steps, 3.0), 2),
        ("heun", lambda steps: sampling_times(steps, 1.0, "cosine"), 2),
        ("dpm++2m", uniform_in_lambda, 2),
    ],
)
def test_order_of_convergence(method, grid, order):
    errors = np.array([gaussian_error(method, grid(steps)) for steps in (32, 64, 128)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.25)


def test_the_cosine_grid_is_fine_near_the_image():
    times = sampling_times(10, 1.0, "cosine")
    assert times[0] == 1
    assert times[-1] == 0
    np.testing.assert_allclose(times[5], 1 - np.sqrt(0.5))
    steps = -np.diff(times)
    assert (np.diff(steps) < 0).all()
    assert times[-2] < 0.2 * sampling_times(10, 1.0)[-2]
    np.testing.assert_allclose(sampling_times(10, 3.0, "cosine"), shift(times, 3.0))


def test_a_picture_is_drawn_on_the_grid_asked_for(model_and_conditions):
    model, conditions = model_and_conditions
    seen = []
    sampling = Sampling("euler", 4, grid="cosine")
    e = torch.randn(3, 3, 32, 24)
    sample(model, conditions, e, flow=FlowConfig(shift=2.0), sampling=sampling, on_step=lambda t, z: seen.append(t))
    assert seen == sampling_times(4, 2.0, "cosine")[1:].tolist()


def test_2m_is_the_formula_with_euler_steps_where_lambda_is_infinite():
    predictions = iter([1.0, 2.0, 5.0, 3.0, 7.0])
    states = {}
    times = np.array([1.0, 0.8, 0.5, 0.3, 0.1, 0.0])
    integrate(
        lambda z, t: torch.full_like(z, next(predictions)), torch.tensor([0.5]), times, "dpm++2m",
        lambda t, z: states.update({t: z.item()}),
    )  # fmt: skip
    z = 1 + 0.8 * (0.5 - 1)  # the first step
    expected = {0.8: z}
    z = expected[0.5] = 2 + 0.5 / 0.8 * (z - 2)  # the second: lambda(1) is infinite
    for t, t_next, t_before, x, x_before in ((0.5, 0.3, 0.8, 5.0, 2.0), (0.3, 0.1, 0.5, 3.0, 5.0)):
        h, h_before = log_snr(t_next) - log_snr(t), log_snr(t) - log_snr(t_before)
        r = h_before / h
        d = (1 + 1 / (2 * r)) * x - 1 / (2 * r) * x_before
        z = expected[t_next] = d + t_next / t * (z - d)
    expected[0.0] = 7.0  # the last
    assert states == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def model_and_conditions():
    torch.manual_seed(0)
    tread = TreadConfig(enabled=True, start=1, end=1)
    model = build_model(
        ModelConfig(hidden_size=32, depth=3, num_heads=2, patch_size=8, bottleneck=16),
        Features(32, {"text": 16, "cls": 8, "patches": 8, "pose": 3}),
        tread,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    conditions = collate(
        text=[rng.standard_normal((5, 16)) for _ in range(3)],
        cls=[rng.standard_normal(8) for _ in range(3)],
        patches=[rng.standard_normal((4, 4, 8)) for _ in range(3)],
        pose=[rng.random((133, 3)) for _ in range(3)],
        count=3,
    )
    return model, conditions


@pytest.fixture
def keep_ids():
    return trajectory_keep_ids(TreadConfig(enabled=True), [("a", 0), ("a", 1), ("b", 0)], 12)


def test_guidance_one_is_the_conditional_model_and_zero_the_unconditional(model_and_conditions):
    model, conditions = model_and_conditions
    e = torch.randn(3, 3, 32, 24)

    def draw(kept, guidance=1.0):
        return sample(model, kept, e, flow=FlowConfig(), sampling=Sampling("heun", 3, guidance, interval=(0, 1)))

    nothing = draw(conditions.keeping(()))
    torch.testing.assert_close(draw(conditions, 0.0), nothing, atol=1e-5, rtol=1e-5)
    at_one, near_one = draw(conditions), draw(conditions, 1 + 1e-7)
    torch.testing.assert_close(at_one, near_one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(at_one, nothing, atol=1e-3)


def weights_by_name(given: str, **scales: float) -> dict[str, float]:
    names = {parse_subset(name): name for name in ("nothing", "text", "pose", "text+pose", "text+cls+patches", "all")}
    return {names[subset]: weight for subset, weight in chain(parse_subset(given), scales).items()}


@pytest.mark.parametrize(
    ("given", "scales", "expected"),
    [
        # a + w_t (b - a) + w_d (c - b) with a, b, c = nothing, text, all but pose
        ("text+cls+patches", {"text": 4.0, "dino": 2.5}, {"nothing": -3.0, "text": 1.5, "text+cls+patches": 2.5}),
        # with a pose, which is kept: pose, text+pose, all
        ("all", {"text": 4.0, "dino": 2.5}, {"pose": -3.0, "text+pose": 1.5, "all": 2.5}),
        ("all", {"pose": 2.0, "text": 4.0, "dino": 3.0}, {"nothing": -1.0, "pose": -2.0, "text+pose": 1.0, "all": 3.0}),
        ("text+pose", {"text": 3.0}, {"pose": -2.0, "text+pose": 3.0}),
        ("text+pose", {"pose": 3.0}, {"nothing": -2.0, "pose": 2.0, "text+pose": 1.0}),
        ("all", {"dino": 2.0}, {"text+pose": -1.0, "all": 2.0}),
        # equal scales need the ends alone, and no scale nothing but what is given
        ("text+cls+patches", {"text": 3.0, "dino": 3.0}, {"nothing": -2.0, "text+cls+patches": 3.0}),
        ("all", {"pose": 3.0, "text": 3.0, "dino": 3.0}, {"nothing": -2.0, "all": 3.0}),
        ("all", {}, {"all": 1.0}),
        ("nothing", {"text": 3.0}, {"nothing": 1.0}),
    ],
)
def test_the_chain_of_guidance(given, scales, expected):
    assert weights_by_name(given, **scales) == expected


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("given", ["all", "text+cls+patches"])
def test_dual_guidance_is_its_formula(model_and_conditions, prediction, given):
    model, conditions = model_and_conditions
    kept = conditions.keeping(parse_subset(given))
    z, t = torch.randn(3, 3, 32, 24), torch.full((3,), 0.7)
    names = ("pose", "text+pose", "all") if given == "all" else ("nothing", "text", given)
    a, b, c = (to_x(model(z, t, conditions.keeping(parse_subset(name))), z, t, prediction) for name in names)
    assert not torch.allclose(a, b, atol=1e-3)
    assert not torch.allclose(b, c, atol=1e-3)
    sampling = Sampling(scales={"text": 4.0, "dino": 2.5})
    guided = guided_denoiser(model, kept, 32, 24, FlowConfig(prediction=prediction), sampling)
    torch.testing.assert_close(guided(z, 0.7), a + 4 * (b - a) + 2.5 * (c - b), atol=1e-5, rtol=1e-5)


def test_every_image_of_a_mixed_batch_is_guided_by_what_it_has(model_and_conditions):
    model, conditions = model_and_conditions
    mixed = conditions.keeping([parse_subset(name) for name in ("all", "text", "text+cls+patches")])
    e = torch.randn(3, 3, 32, 32)
    arguments = {"flow": FlowConfig(), "sampling": Sampling(steps=3, scales={"text": 3.0, "dino": 2.0, "pose": 1.5})}
    together = sample(model, mixed, e, **arguments)
    for i in range(3):
        alone = sample(model, mixed.select([i]).keeping(mixed_subset(mixed, i)), e[i : i + 1], **arguments)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def mixed_subset(conditions, i: int) -> frozenset[str]:
    return frozenset(name for name in ("text", "cls", "patches", "pose") if conditions.keeps(name)[i])


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_guidance_acts_within_its_interval_of_unshifted_time(model_and_conditions, s):
    model, conditions = model_and_conditions
    z = torch.randn(3, 3, 32, 24)
    guided, plain = (
        guided_denoiser(model, conditions, 32, 24, FlowConfig(shift=s), Sampling(guidance=g, interval=(0.2, 0.9)))
        for g in (3.0, 1.0)
    )
    for unshifted, acts in ((1.0, False), (0.91, False), (0.9, True), (0.5, True), (0.2, True), (0.19, False)):
        t = float(shift(unshifted, s))
        assert torch.equal(guided(z, t), plain(z, t)) != acts, unshifted


@pytest.mark.parametrize("s", [1.0, 3.0])
@pytest.mark.parametrize(
    ("method", "settings", "forwards", "contexts"),
    [
        # 10 steps; 9 of the 10 times lie within the interval, and 9 of the 9 where Heun corrects
        ("euler", {}, 10, 1),
        ("heun", {}, 19, 1),
        ("dpm++2m", {}, 10, 1),
        ("euler", {"guidance": 2.0}, 10 + 9, 2),
        ("heun", {"guidance": 2.0}, 19 + 18, 2),
        ("dpm++2m", {"guidance": 2.0}, 10 + 9, 2),
        ("dpm++2m", {"guidance": 2.0, "interval": (0.0, 1.0)}, 20, 2),
        ("dpm++2m", {"guidance": 2.0, "interval": (0.3, 0.7)}, 10 + 5, 2),
        ("dpm++2m", {"scales": {"text": 3.0, "dino": 2.0}}, 10 + 2 * 9, 3),
        ("dpm++2m", {"scales": {"text": 3.0, "dino": 3.0}}, 10 + 9, 2),
        ("euler", {"self_guidance": 3.0}, 10 + 9, 1),
    ],
)
def test_forwards_and_contexts_are_as_few_as_can_be(
    model_and_conditions, keep_ids, monkeypatch, s, method, settings, forwards, contexts
):
    model, conditions = model_and_conditions
    counts = Counter()

    def count(name, function):
        return lambda *arguments, **named: counts.update([name]) or function(*arguments, **named)

    monkeypatch.setattr(model, "forward", count("forward", model.forward))
    for block in model.blocks:
        monkeypatch.setattr(block.attention, "context_kv", count("kv", block.attention.context_kv))
    e = torch.randn(3, 3, 32, 24)
    sampling = Sampling(method, 10, **settings)
    sample(model, conditions, e, flow=FlowConfig(shift=s), sampling=sampling, keep_ids=keep_ids)
    assert counts == {"forward": forwards, "kv": contexts * len(model.blocks)}


def test_what_training_never_saw_is_refused_by_name(model_and_conditions):
    model, _ = model_and_conditions
    everything = parse_subset("all")
    seed = ConditioningConfig(preset="seed").resolve()
    Sampling(guidance=2.0).check(everything, seed, model)
    with pytest.raises(ConfigError, match=r"conditions text\+pose: never trained .* nothing; trained: nothing, text"):
        Sampling().check(parse_subset("text+pose"), seed, model)
    with pytest.raises(ConfigError, match=r"conditions text\+pose: .* \(guidance leads from or through them\)"):
        Sampling(scales={"text": 3.0, "dino": 2.0}).check(everything, seed, model)
    Sampling(scales={"text": 3.0, "dino": 3.0}).check(everything, seed, model)  # pose and all are enough
    quickstart = ConditioningConfig(preset="quickstart").resolve()
    with pytest.raises(ConfigError, match="conditions pose: never trained"):
        Sampling(scales={"text": 3.0}).check(parse_subset("text+pose"), quickstart, model)
    with pytest.raises(ConfigError, match="conditions nothing: never trained"):
        Sampling(guidance=3.0).check(everything, {everything: 1.0}, model)
    with pytest.raises(ConfigError, match=r"guidance scale of dino: not among the conditions, text\+pose"):
        Sampling(scales={"dino": 3.0}).check(parse_subset("text+pose"), quickstart, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ddim"}, "sampler 'ddim': unknown; use one of euler, heun, dpm"),
        ({"grid": "cosin"}, "sampling grid 'cosin': unknown; use one of uniform, cosine"),
        ({"steps": 0}, "sampling steps 0: must be at least 1"),
        ({"guidance": float("nan")}, "guidance nan: must be a number from 0 on"),
        ({"self_guidance": -1.0}, "self-guidance -1.0: must be a number from 0 on"),
        ({"scales": {"cls": 2.0}}, "guidance scale of 'cls': unknown; use dino, pose, text"),
        ({"scales": {"text": -2.0}}, "guidance scale of text -2.0: must be a number from 0 on"),
        ({"interval": (0.9, 0.1)}, "guidance interval 0.9 to 0.1: must be"),
        ({"interval": (0.0, 1.5)}, "guidance interval 0 to 1.5: must be"),
        ({"guidance": 2.0, "scales": {"text": 3.0}}, "take the place of guidance, which is 2"),
        ({"guidance": 2.0, "self_guidance": 3.0}, "takes the place of guidance, which is 2"),
        ({"scales": {"text": 2.0}, "self_guidance": 3.0}, "takes the place of guidance, which has scales"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_settings_are_json():
    sampling = Sampling("dpm++2m", 8, scales={"text": 3.0}, interval=(0.1, 0.8), grid="cosine")
    settings = json.loads(json.dumps(sampling.settings()))
    assert Sampling(settings.pop("sampler"), **{**settings, "interval": tuple(settings["interval"])}) == sampling


def test_an_image_does_not_depend_on_its_batch(model_and_conditions):
    model, conditions = model_and_conditions
    e = torch.randn(3, 3, 32, 32)
    arguments = {"flow": FlowConfig(), "sampling": Sampling(steps=3, guidance=2.0)}
    together = sample(model, conditions, e, **arguments)
    alone = sample(model, conditions.select(slice(1, 2)), e[1:2], **arguments)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_sampling_leaves_the_training_mode_alone(model_and_conditions):
    model, conditions = model_and_conditions
    model.train()
    sample(model, conditions, torch.randn(3, 3, 32, 32), flow=FlowConfig(), sampling=Sampling(steps=1))
    assert model.training


def test_pixels_are_rounded_and_clipped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_self_guidance_leads_from_the_routed_to_the_dense_network(model_and_conditions, keep_ids, prediction):
    model, conditions = model_and_conditions
    flow = FlowConfig(prediction=prediction)
    z, t = torch.randn(3, 3, 32, 24), torch.full((3,), 0.7)
    dense, routed = (to_x(model(z, t, conditions, ids), z, t, prediction) for ids in (None, keep_ids))
    guided = Sampling("euler", 3, self_guidance=3.0)
    denoise = guided_denoiser(model, conditions, 32, 24, flow, guided, keep_ids)
    torch.testing.assert_close(denoise(z, 0.7), routed + 3 * (dense - routed), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dense, routed, atol=1e-3)
    torch.testing.assert_close(denoise(z, 0.95), to_x(model(z, t + 0.25, conditions), z, t + 0.25, prediction))
    drawn = sample(model, conditions, z, flow=flow, sampling=guided, keep_ids=keep_ids)
    torch.testing.assert_close(drawn, integrate(denoise, z, sampling_times(3, 1.0), "euler").detach())
    plain = sample(model, conditions, z, flow=flow, sampling=Sampling("euler", 3))
    near = sample(
        model, conditions, z, flow=flow, sampling=Sampling("euler", 3, self_guidance=1 + 1e-7), keep_ids=keep_ids
    )
    torch.testing.assert_close(near, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "name", "fields"),
    [
        (1.0, "1", {}),
        (2, "2", {"guidance": 2.0}),
        ({}, "1", {}),
        ({"text": 3.0, "dino": 1.5}, "dino=1.5,text=3", {"scales": {"text": 3.0, "dino": 1.5}}),
        ({"text": 3.0, "dino": 1.0}, "text=3", {"scales": {"text": 3.0}}),
        ({"self": 3.0}, "self=3", {"self_guidance": 3.0}),
    ],
)
def test_a_config_says_guidance_as_a_number_or_by_name(value, name, fields):
    guidance = Guidance.of(value)
    assert str(guidance) == name
    assert Sampling(**guidance.fields) == Sampling(**fields)
    assert (guidance == NO_GUIDANCE) == (not fields)
    assert guidance.of_given(parse_subset("cls+pose")).scales == tuple(
        (one, scale) for one, scale in guidance.scales if one == "dino"
    )


@pytest.mark.parametrize("value", [-1.0, float("nan"), {"face": 2.0}, {"self": 3.0, "text": 2.0}, {"self": -1.0}])
def test_a_config_with_senseless_guidance_is_refused(value):
    with pytest.raises(ValidationError):
        VisualDebugSection(guidance=value)


def test_self_guidance_tokens_belong_to_the_sample_and_the_seed():
    tread = TreadConfig(enabled=True, keep=0.25)
    a0, a1, b0 = trajectory_keep_ids(tread, [("a", 0), ("a", 1), ("b", 0)], 64)
    assert torch.equal(a0, trajectory_keep_ids(tread, [("a", 0)], 64)[0])
    assert len({tuple(ids.tolist()) for ids in (a0, a1, b0)}) == 3
    assert a0.shape == (16,)


def test_self_guidance_is_refused_where_there_is_no_weaker_self(model_and_conditions):
    routed, conditions = model_and_conditions
    model = build_model(routed.config, routed.features)
    arguments = {"flow": FlowConfig(), "sampling": Sampling(steps=1, self_guidance=3.0)}
    with pytest.raises(ConfigError, match="trained without routing"):
        sample(model, conditions, torch.randn(3, 3, 32, 24), **arguments)
    with pytest.raises(ValueError, match="keep_ids of trajectory_keep_ids are missing"):
        sample(routed, conditions, torch.randn(3, 3, 32, 24), **arguments)
    table = {parse_subset("all"): 1.0}
    arguments["sampling"].check(parse_subset("all"), table, routed)
    with pytest.raises(ConfigError, match="trained without routing"):
        arguments["sampling"].check(parse_subset("all"), table, model)


# Precision


def test_tf32_is_no_other_arithmetic_on_a_cpu_and_leaves_nothing_behind(model_and_conditions):
    model, conditions = model_and_conditions
    arguments = model, conditions, torch.randn(3, 3, 32, 24)
    plain, tf32 = (
        sample(*arguments, flow=FlowConfig(), sampling=replace(DRAWING, steps=4, precision=name))
        for name in ("fp32", "tf32")
    )
    assert torch.equal(plain, tf32)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_bf16_draws_nearly_the_picture_of_fp32(model_and_conditions, prediction):
    """The bound is what a network of random weights, which no picture resembles, stays well within."""
    model, conditions = model_and_conditions
    arguments = model, conditions, torch.randn(3, 3, 32, 24)
    plain, bf16 = (
        sample(*arguments, flow=FlowConfig(prediction=prediction), sampling=replace(DRAWING, precision=name))
        for name in ("fp32", "bf16")
    )
    assert bf16.dtype == torch.float32
    assert not torch.equal(plain, bf16), "it was computed otherwise"
    assert psnr(bf16, plain) >= PSNR["bf16"]


def test_tf32_is_asked_of_cuda_while_it_draws(model_and_conditions):
    model, conditions = model_and_conditions
    seen = []
    sampling = Sampling("euler", 2, precision="tf32")
    look = lambda t, z: seen.append(torch.backends.cuda.matmul.allow_tf32)  # noqa: E731
    sample(model, conditions, torch.randn(3, 3, 32, 24), flow=FlowConfig(), sampling=sampling, on_step=look)
    assert seen == [True, True]
    assert not torch.backends.cuda.matmul.allow_tf32


def test_settings_name_a_precision_that_is_not_fp32():
    assert "precision" not in DRAWING.settings()
    assert replace(DRAWING, precision="tf32").settings()["precision"] == "tf32"
    with pytest.raises(ConfigError, match="precision 'fp16': unknown; use one of fp32, tf32, bf16"):
        Sampling(precision="fp16")

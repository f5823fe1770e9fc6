"""Muon against the formula and against torch's; groups from tags; state that survives a round trip."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.train.model.test_network import conditions, make_model
from train.method import optim
from train.method.optim import (
    NS_COEFFICIENTS,
    Muon,
    OptimizerConfig,
    build_optimizer,
    orthogonalize,
    parameter_groups,
)


def test_trap_18_groups_are_exactly_the_tagged_ones():
    groups = parameter_groups(make_model(depth=1, output_conv=True))
    block = "blocks.0."
    assert sorted(groups["muon"]) == [
        f"{block}attention.{name}.weight" for name in ("context_k", "context_v", "k", "out", "q", "v")
    ] + [f"{block}mlp.{name}.weight" for name in ("down", "gate", "up")]
    assert sorted(groups["adamw"]) == [
        f"{block}attention.context_k_norm",
        f"{block}attention.k_norm",
        f"{block}attention.q_norm",
        f"{block}offset",
        "context.cls.bias", "context.cls.weight", "context.cls_to_adaln.bias", "context.cls_to_adaln.weight",
        "context.joint", "context.no_person", "context.null", "context.null_cls_to_adaln", "context.null_joint",
        "context.patches.bias", "context.patches.weight",
        "context.pose.0.bias", "context.pose.0.weight", "context.pose.2.bias", "context.pose.2.weight",
        "context.pose_position.weight", "context.role",
        "context.text.bias", "context.text.weight", "context.text_order",
        "final.bias", "final.weight", "final_modulation.bias", "final_modulation.weight",
        "modulation.bias", "modulation.weight", "output_conv.bias", "output_conv.weight",
        "patch_bottleneck.weight", "patch_embedding.bias", "patch_embedding.weight",
        "timestep.mlp.0.bias", "timestep.mlp.0.weight", "timestep.mlp.2.bias", "timestep.mlp.2.weight",
    ]  # fmt: skip


def test_an_untagged_parameter_is_an_error():
    model = make_model()
    model.extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="extra"):
        build_optimizer(model, OptimizerConfig())


def reference_orthogonalize(g):
    """The formula, one matrix at a time."""
    a, b, c = NS_COEFFICIENTS
    x = g / (g.norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_newton_schulz_equals_the_formula(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape)
    result = orthogonalize(g)
    for matrix, expected in zip(result, map(reference_orthogonalize, g)):
        torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=1e-5)


def polynomial(s):
    """What five steps make of a singular value: the matrices only ever rotate with it."""
    a, b, c = NS_COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


def test_singular_values_end_in_the_measured_band():
    s = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    after = polynomial(s)
    assert after.max() < 1.2024
    assert after[s >= 0.0016].min() > 0.6818  # .16 % of the Frobenius norm
    # below that, almost by the linear term alone: a^5 = 485 times as much
    assert polynomial(torch.tensor(1e-4)) == pytest.approx(485e-4, rel=0.01)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_each_singular_value_follows_the_polynomial(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -3, min(shape), dtype=torch.float64)
    result = orthogonalize(((u * s) @ vh).unsqueeze(0).float())[0]
    expected = (u * polynomial(s / s.norm())) @ vh
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(192, 192), (512, 192)])
def test_updates_of_the_models_sizes_are_near_orthogonal_in_bfloat16(shape):
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(2, *shape).bfloat16())
    singular = torch.linalg.svdvals(result.float())
    if shape[0] != shape[1]:
        assert singular.min() > 0.65  # a square Gaussian matrix also has singular values next to nothing
    assert (singular > 0.65).float().mean() > 0.95
    assert singular.max() < 1.25


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_muon_step_is_the_formula(weight_decay, factor):
    """Momentum and Nesterov as torch's, then the decay, then -.2 sqrt(max(a, b)) lr times the orthogonalised matrix."""
    torch.manual_seed(0)
    config = OptimizerConfig(weight_decay=weight_decay, muon_lr_factor=factor, muon_momentum=0.9)
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in {"a": (16, 48), "b": (48, 16)}.items()}
    muon = Muon(weights, config, torch.float32)
    muon.lr = 1e-2
    expected = {name: weight.detach().clone() for name, weight in weights.items()}
    momentum = dict.fromkeys(weights, 0.0)
    for _ in range(3):
        for name, weight in weights.items():
            g = weight.grad = torch.randn_like(weight)
            momentum[name] = 0.9 * momentum[name] + 0.1 * g
            update = reference_orthogonalize(0.1 * g + 0.9 * momentum[name])
            rate = 1e-2 * factor
            expected[name] = expected[name] * (1 - rate * weight_decay) - rate * 0.2 * math.sqrt(48) * update
        muon.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), expected[name], atol=1e-5, rtol=1e-5)


def test_how_many_matrices_are_taken_together_changes_nothing(monkeypatch):
    def updated(size):
        monkeypatch.setitem(optim.BATCH_BYTES, "cpu", size)
        torch.manual_seed(0)
        weights = {str(i): nn.Parameter(torch.randn(24, 40)) for i in range(7)}
        muon = Muon(weights, OptimizerConfig(), torch.float32)
        muon.lr = 1e-2
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        muon.step()
        assert sorted(name for batch in muon._batches for name in batch) == sorted(weights)
        return len(muon._batches), torch.stack([*weights.values()]).detach()

    (one, together), (four, apart) = updated(1 << 20), updated(1)
    assert (one, four) == (1, 4)
    assert torch.equal(together, apart)


def test_the_groups_are_described_in_a_line():
    model = make_model(depth=1)
    groups = parameter_groups(model)
    counts = {name: sum(p.numel() for p in group.values()) / 1e6 for name, group in groups.items()}
    assert build_optimizer(model, OptimizerConfig()).describe() == (
        f"optimiser: Muon on 9 matrices ({counts['muon']:.2f} M parameters), "
        f"AdamW on {len(groups['adamw'])} tensors ({counts['adamw']:.2f} M parameters)"
    )
    alone = build_optimizer(model, OptimizerConfig(type="adamw")).describe()
    assert alone.startswith(f"optimiser: AdamW on {9 + len(groups['adamw'])} tensors")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"muon_nesterov": False},
        {"muon_ns_steps": 3},
        {"muon_adjust_lr": "original"},
        {"muon_momentum": 0.5},
    ],
)
def test_muon_follows_torch(settings):
    torch.manual_seed(0)
    ours = make_model()
    theirs = make_model()
    matrices = parameter_groups(ours)["muon"]
    config = OptimizerConfig(**settings)
    optimizer = build_optimizer(ours, config)
    optimizer.set_lr(1e-2)
    reference = torch.optim.Muon(
        list(parameter_groups(theirs)["muon"].values()),
        lr=1e-2, momentum=config.muon_momentum, nesterov=config.muon_nesterov, weight_decay=config.weight_decay,
        ns_steps=config.muon_ns_steps, adjust_lr_fn=config.muon_adjust_lr,
    )  # fmt: skip
    start = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    for _ in range(3):
        for name, parameter in theirs.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            dict(ours.named_parameters())[name].grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    for name, parameter in parameter_groups(theirs)["muon"].items():
        moved, expected = matrices[name] - start[name], parameter - start[name]
        assert (moved - expected).norm() / expected.norm() < 0.05, name  # torch computes in bfloat16


def test_state_survives_a_round_trip_bit_for_bit():
    torch.manual_seed(0)
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    batches = [(torch.randn(2, 3, 32, 32), torch.rand(2)) for _ in range(6)]

    def train(model, optimizer, batches):
        for z, t in batches:
            model(z, t, conditions()).sub(1).square().mean().backward()
            optimizer.set_lr(1e-3)
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, batches[:3])
    copy = make_model()
    copy.load_state_dict(model.state_dict())
    restored = build_optimizer(copy, OptimizerConfig())
    restored.load_tensors({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    train(model, optimizer, batches[3:])
    train(copy, restored, batches[3:])
    for one, other in zip(model.parameters(), copy.parameters()):
        assert torch.equal(one, other)


def test_foreign_state_is_refused():
    optimizer = build_optimizer(make_model(), OptimizerConfig())
    state = optimizer.tensors()
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_tensors({**state, "muon/momentum/blocks.9.mlp.up.weight": torch.zeros(2)})
    name = "muon/momentum/blocks.0.mlp.up.weight"
    with pytest.raises(ValueError, match="lacks"):
        optimizer.load_tensors({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="expected"):
        optimizer.load_tensors({**state, name: torch.zeros(2)})
    with pytest.raises(ValueError, match=r"lacks 3 tensors, first adamw/exp_avg/final\.weight"):
        optimizer.load_tensors({key: value for key, value in state.items() if not key.endswith("/final.weight")})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_parameter_without_a_gradient_has_its_state_and_starts_as_torch_would(weight_decay):
    torch.manual_seed(0)
    ours, theirs = make_model(), make_model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, OptimizerConfig(type="adamw", weight_decay=weight_decay))
    assert optimizer.muon is None
    optimizer.set_lr(1e-2)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    for step in range(3):
        for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters()):
            late = name == "final.weight" and step < 2
            parameter.grad = None if late else torch.randn_like(parameter)
            other.grad = None if late else parameter.grad.clone()
        optimizer.step()
        reference.step()
        assert "adamw/exp_avg/final.weight" in optimizer.tensors()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fast", [True, False])
def test_newton_schulz_computes_in_bfloat16_where_that_is_fast(monkeypatch, fast):
    monkeypatch.setattr(optim, "has_fast_bf16", lambda: fast)
    muon = build_optimizer(make_model(), OptimizerConfig()).muon
    assert muon.dtype == (torch.bfloat16 if fast else torch.float32)
    with torch.device("meta"):  # as on a GPU
        model = make_model()
    assert build_optimizer(model, OptimizerConfig()).muon.dtype == torch.bfloat16


def test_gradients_are_forgotten_and_a_step_without_a_rate_changes_nothing():
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())

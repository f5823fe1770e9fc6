"""Muon against the formula and against torch's; groups from tags; state that survives a round trip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.train.test_model import conditions, make_model
from train.optim import (
    NS_COEFFICIENTS,
    OptimizerConfig,
    build_optimizer,
    learning_rate,
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
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.3
    assert singular.max() < 1.3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_follows_torch(weight_decay):
    torch.manual_seed(0)
    ours = make_model()
    theirs = make_model()
    matrices = parameter_groups(ours)["muon"]
    config = OptimizerConfig(weight_decay=weight_decay)
    optimizer = build_optimizer(ours, config)
    optimizer.set_lr(1e-2)
    reference = torch.optim.Muon(
        list(parameter_groups(theirs)["muon"].values()),
        lr=1e-2, momentum=config.muon_momentum, nesterov=True, weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
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


def test_a_parameter_without_a_gradient_has_its_state_and_starts_as_torch_would():
    torch.manual_seed(0)
    ours, theirs = make_model(), make_model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, OptimizerConfig(type="adamw"))
    optimizer.set_lr(1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
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


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 1e-3, 1e-6, None, 1000) for step in range(1000)]
    assert rates[0] > 0
    assert rates[50] == pytest.approx(1e-3)
    assert rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(1e-6, rel=0.01)
    assert learning_rate(0, 1.0, 0.0, 0, 10) == 1.0

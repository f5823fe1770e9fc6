"""Muon for the blocks' matrices, AdamW for everything else.

Groups come from the tags that :mod:`train.model.network` sets where a parameter is defined; an untagged one is an
error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanodit.config import Config
from train.hardware import has_fast_bf16

# quintic Newton-Schulz iteration; Jordan et al., "Muon: an optimizer for hidden layers", 2024
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# matrices orthogonalised together, in bytes of the type computed in: what a CPU's second-level cache holds with its
# intermediates (tests/benchmarks/muon.py); on a GPU, for which the meta device stands, enough to fill it, and no more,
# because it is extra memory
BATCH_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26, "meta": 1 << 26}


class OptimizerConfig(Config):
    """Which optimiser, and its constants."""

    type: Literal["muon", "adamw"] = "muon"  # "muon": Muon on the blocks' matrices, AdamW on the rest
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_nesterov: bool = True
    muon_ns_steps: int = Field(default=5, gt=0)  # of Newton-Schulz
    muon_adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    muon_lr_factor: float = Field(default=1.0, gt=0)


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return {"muon": {name: parameter}, "adamw": {...}} from the tags; raises ValueError for an untagged one."""
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "adamw": {}}
    for name, parameter in model.named_parameters():
        group = getattr(parameter, "optimizer_group", None)
        if group not in groups:
            raise ValueError(
                f"parameter {name} has optimizer_group {group!r}; tag it where it is defined (train/model/network.py)"
            )
        groups[group][name] = parameter
    return groups


def orthogonalize(g_kab: Tensor, steps: int = 5) -> Tensor:
    """Bring each matrix of a batch (k, a, b) near an orthogonal one by Newton-Schulz steps, in its dtype.

    After five steps singular values are between .68 and 1.21 where they were at least .16 % of the matrix's Frobenius
    norm; smaller ones grow by 485 at most.
    """
    tall = g_kab.shape[1] > g_kab.shape[2]
    x = g_kab / (g_kab.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    a, b, c = NS_COEFFICIENTS
    for _ in range(steps):
        # a x + (b gram + c gram gram) x, or from the right, whichever gram is smaller; in three fused products
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def update_scale(rows: int, columns: int, adjust_lr: str) -> float:
    """Return what multiplies the orthogonalised momentum of a matrix; names as ``adjust_lr_fn`` of torch.optim.Muon.

    ``match_rms_adamw``: ``.2 sqrt(max(a, b))``, the RMS of AdamW's updates, so both optimisers share one learning rate
    (Liu et al., arXiv 2502.16982). ``original``: ``sqrt(max(1, a / b))`` (Jordan et al.).
    """
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


class Muon:
    """Muon, batched over matrices of equal shape; ``dtype`` is what Newton-Schulz computes in."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimizerConfig, dtype: torch.dtype) -> None:
        self.parameters, self.config = parameters, config
        self.lr = 0.0
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.compute_in(dtype)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let Newton-Schulz compute in ``dtype`` from now on."""
        self.dtype = dtype
        shapes: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            shapes[parameter.shape].append(name)
        limit = BATCH_BYTES[next(iter(self.parameters.values())).device.type]
        self._batches: list[list[str]] = []
        for shape, names in shapes.items():
            size = max(2, limit // (shape.numel() * dtype.itemsize))
            self._batches += [names[i : i + size] for i in range(0, len(names), size)]

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update to every parameter of the group."""
        beta, decay = self.config.muon_momentum, self.config.weight_decay
        rate = self.lr * self.config.muon_lr_factor
        for names in self._batches:
            weights = [self.parameters[name] for name in names]
            gradients = [weight.grad for weight in weights]
            momenta = [self.momentum[name] for name in names]
            # torch.optim.Muon: m = lerp(m, g, 1 - beta), update = lerp(g, m, beta)
            torch._foreach_lerp_(momenta, gradients, 1 - beta)
            directions = torch._foreach_lerp(gradients, momenta, beta) if self.config.muon_nesterov else momenta
            direction_kab = torch.stack(directions).to(self.dtype)
            scale = update_scale(*direction_kab.shape[1:], self.config.muon_adjust_lr)
            update_kab = orthogonalize(direction_kab, self.config.muon_ns_steps).float() * (-rate * scale)
            if decay:
                torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_add_(weights, list(update_kab.unbind(0)))


class AdamW:
    """AdamW by torch's fused kernel: the bits of ``torch.optim.AdamW``, whose making imports the compiler.

    That is a second of every start. A parameter without a gradient keeps its state.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters, self.config = parameters, config
        self.lr = 0.0
        # from the start, so that a checkpoint that lacks any of it is damaged
        self.state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update to every parameter of the group that has a gradient."""
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        steps, means, squares = ([self.state[name][key] for name in names] for key in ("step", "exp_avg", "exp_avg_sq"))
        weights = [self.parameters[name] for name in names]
        beta1, beta2 = self.config.betas
        adamw(
            weights, [weight.grad for weight in weights], means, squares, [], steps, fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=self.lr, weight_decay=self.config.weight_decay, eps=self.config.eps,
            maximize=False,
        )  # fmt: skip


class Optimizer:
    """The optimiser of a run: Muon + AdamW, or AdamW alone; one learning rate for both."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        groups = parameter_groups(model)
        if config.type == "adamw":
            groups = {"muon": {}, "adamw": {**groups["muon"], **groups["adamw"]}}
        self.muon = Muon(groups["muon"], config, torch.float32) if groups["muon"] else None
        self.use_fast_bf16(has_fast_bf16())
        self.adamw = AdamW(groups["adamw"], config)

    @property
    def _both(self) -> list[Muon | AdamW]:
        return [self.adamw, *([self.muon] if self.muon else [])]

    def use_fast_bf16(self, fast: bool) -> None:
        """Let Muon compute in bfloat16, as published, on a GPU and on a CPU that is ``fast`` at it; else in float32."""
        if self.muon:
            on_cpu = next(iter(self.muon.parameters.values())).device.type == "cpu"
            self.muon.compute_in(torch.float32 if on_cpu and not fast else torch.bfloat16)

    def describe(self) -> str:
        """Return one line: tensors and parameters of each group."""
        groups = {
            "Muon": list(self.muon.parameters.values()) if self.muon else [],
            "AdamW": list(self.adamw.parameters.values()),
        }
        counts = [
            f"{name} on {len(group)} {what} ({sum(p.numel() for p in group) / 1e6:.2f} M parameters)"
            for (name, group), what in zip(groups.items(), ("matrices", "tensors"))
            if group
        ]
        return f"optimiser: {', '.join(counts)}"

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for one in self._both:
            one.lr = lr

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for one in self._both:
            one.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for one in self._both:
            for parameter in one.parameters.values():
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as a flat dict of tensors, for safetensors; complete also before the first step."""
        state = {f"adamw/{key}/{name}": value for name, own in self.adamw.state.items() for key, value in own.items()}
        if self.muon:
            state.update({f"muon/momentum/{name}": value for name, value in self.muon.momentum.items()})
        return state

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned; raises ValueError when a tensor is missing, foreign or misshaped."""
        own = self.tensors()
        if lacking := own.keys() - state.keys():
            raise ValueError(f"optimiser state lacks {len(lacking)} tensors, first {min(lacking)}")
        if foreign := state.keys() - own.keys():
            raise ValueError(f"optimiser state has {len(foreign)} tensors of another model, first {min(foreign)}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"optimiser state {name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build the optimiser of a run from the model's tags."""
    return Optimizer(model, config)

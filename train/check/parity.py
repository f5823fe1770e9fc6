"""The same small network on the device and on the CPU: losses, gradients, optimiser steps, the average and a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nanodit.rng import generator
from train.check.made_up import small_run, trainer_of
from train.check.report import Report, Setting
from train.checkpoint.run_folder import StopRequest
from train.loop.microbatch import MicroBatch
from train.loop.trainer import Trainer
from train.method.sampling import DRAWING, sample
from train.model.attend import Seen, attend
from train.model.attend import seen as choose
from train.model.spans import Spans

CPU = torch.device("cpu")
# relative Frobenius norms of what must be equal but for the order of sums
LOSS, GRADIENT, SAMPLE = 1e-4, 1e-3, 1e-3
STEPS, AFTER_STEPS = 4, 2e-2  # of training; AdamW's first steps are signs, which a rounding can turn
MUON_FP32, MUON_BF16 = 1e-3, 0.25  # of the update of one step, by what Newton-Schulz computes in
BF16_LOSS, BF16_COSINE = 1e-2, 0.999
PACKED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # attention to contexts side by side, and its gradients
LENGTHS, TINY_LENGTHS = (650, 4, 137, 393), (9, 1, 4)  # context tokens of each image


def check(setting: Setting, report: Report) -> None:
    """Compute everything twice, and compare."""
    # TF32 is no error, but it would hide one
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config, data = small_run(setting, report, train__precision="fp32", model__output_conv="true")
    ours, theirs = (trainer_of(config, data, device) for device in (setting.device, CPU))
    seen = kinds(theirs)
    report.note("micro-batches", f"{len(seen)}: {', '.join(sorted(_parts(seen)))}")
    _packed(setting, report)
    _losses_and_gradients(ours, theirs, seen, report)
    _bf16(ours, theirs, seen, report)
    _muon(ours, theirs, seen[0], report)
    for trainer in (ours, theirs):
        trainer.optimizer.zero_grad()
        for _ in range(STEPS):
            numbers = trainer.batches.plan.numbers(trainer.step)
            trainer.update(trainer.accumulate(map(trainer.batches.make, numbers), StopRequest()))
    for name, part in (("weights", _weights), ("average", lambda trainer: trainer.ema.state)):
        worst, _ = apart(part(ours), part(theirs), floor=1e-2)
        report.check(worst <= AFTER_STEPS, f"{name} after {STEPS} steps", f"{worst:.1e}", f"<= {AFTER_STEPS:g}")
    _sample(ours, theirs, report)


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], floor: float) -> tuple[float, str]:
    """Return the largest relative distance of two tensors of one name, and the name; NaN counts as infinite.

    A tensor that is smaller than ``floor`` times the norm of all is measured by that: it may be nothing but rounding.
    """
    total = torch.stack([tensor.double().norm() for tensor in theirs.values()]).norm()
    worst, where = 0.0, ""
    for name, tensor in theirs.items():
        other = tensor.double()
        distance = (ours[name].detach().cpu().double() - other).norm() / max(other.norm(), floor * total, 1e-30)
        distance = float(distance) if bool(torch.isfinite(distance)) else float("inf")
        if distance > worst:
            worst, where = distance, name
    return worst, where


def kinds(trainer: Trainer) -> list[MicroBatch]:
    """Return micro-batches that have every part between them, of the first steps."""
    found: list[MicroBatch] = []
    known: set[str] = set()
    steps = (0, 1, 2, 3, trainer.config.train.steps - 1)  # the last ones are not routed
    for number in chain.from_iterable(map(trainer.batches.plan.numbers, steps)):
        batch = trainer.batches.make(number)
        if new := _parts([batch]) - known:
            known |= new
            found.append(batch)
    return found


def _parts(batches: Iterable[MicroBatch]) -> set[str]:
    found = set()
    for batch in batches:
        found |= {"dense" if batch.keep_ids is None else "routed"}
        for group in batch.groups:
            found |= {*group.prepared, *group.conditions.tensors}
            found |= {"mixed subsets"} if len(set(batch.subsets[group.images])) > 1 else set()
            mask = group.conditions.text_mask
            found |= {"padded text"} if mask is not None and not bool(mask.all()) else set()
    return found


def _losses_and_gradients(ours: Trainer, theirs: Trainer, seen: list[MicroBatch], report: Report) -> None:
    loss = gradient = 0.0
    where = ""
    for batch in seen:
        both = [_step(trainer, batch) for trainer in (ours, theirs)]
        loss = max(loss, apart(both[0][0], both[1][0], floor=1e-3)[0])
        worst, name = apart(both[0][1], both[1][1], floor=1e-3)
        gradient, where = max((gradient, where), (worst, name))
    report.check(loss <= LOSS, "losses in fp32", f"{loss:.1e}", f"<= {LOSS:g}")
    report.check(gradient <= GRADIENT, "gradients in fp32", f"{gradient:.1e} {where}", f"<= {GRADIENT:g}")


def _bf16(ours: Trainer, theirs: Trainer, seen: list[MicroBatch], report: Report) -> None:
    loss, cosine = 0.0, 1.0
    ours.autocast_dtype = torch.bfloat16
    for batch in seen:
        (losses, gradients), (true_losses, true) = (_step(trainer, batch) for trainer in (ours, theirs))
        loss = max(loss, apart({"flow": losses["flow"]}, {"flow": true_losses["flow"]}, floor=1e-3)[0])
        a, b = (torch.cat([part[name].cpu().double().flatten() for name in true]) for part in (gradients, true))
        cosine = min(cosine, float(torch.nn.functional.cosine_similarity(a, b, dim=0).nan_to_num(-1)))
    ours.autocast_dtype = None
    report.check(loss <= BF16_LOSS, "losses in bf16", f"{loss:.1e}", f"<= {BF16_LOSS:g}")
    report.check(cosine > BF16_COSINE, "gradients in bf16", f"cosine {cosine:.6f}", f"> {BF16_COSINE:g}")


def _packed(setting: Setting, report: Report) -> None:
    """Compare attention to contexts of unequal length with one mask over padding, both on the device.

    On a GPU in bf16, where it is torch's varlen attention, beside fp32 of the same numbers; on a CPU in fp32.
    """
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    lengths, n, h, k = (TINY_LENGTHS, 6, 2, 16) if setting.tiny else (LENGTHS, 256, 12, 64)
    shown = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    spans = Spans.of(shown).map(lambda tensor: tensor.to(setting.device))
    each = Seen(torch.tensor(lengths))
    packed = choose(spans, n, h, k, dtype, compiled=False) if setting.on_gpu else each
    if packed.mask is not None:
        report.note("attention side by side", "left out: this card or this torch has no varlen attention")
        return
    mask = torch.nn.functional.pad(shown, (n, 0), value=True)[:, None, None].to(setting.device)
    rng = generator("check", "attention")
    shapes = [(len(lengths), n, h, k)] * 4 + [(sum(lengths), h, k)] * 2
    drawn = [torch.from_numpy(rng.standard_normal(shape)).to(setting.device, dtype) for shape in shapes]
    found = []
    for form, exact in ((packed, dtype), (Seen(slots=spans.slots, mask=mask), torch.float32)):
        weight, *tensors = [one.to(exact).requires_grad_() for one in drawn]
        q, own_k, own_v, *context = tensors
        output = attend(q, own_k, own_v, (context[0], context[1]), form)
        (output * weight.detach()).sum().backward()
        named = zip(("q", "k", "v", "context k", "context v"), tensors)
        found.append({"output": output.detach().cpu()} | {name: one.grad.cpu() for name, one in named})
    worst, name = apart(*found, floor=1e-3)
    kind = "varlen" if packed.keys is not None else "image by image"
    report.check(worst <= PACKED[dtype], f"attention {kind} in {dtype}", f"{worst:.1e} {name}", f"<= {PACKED[dtype]:g}")


def _step(trainer: Trainer, batch: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses of a micro-step, and its gradients."""
    trainer.optimizer.zero_grad()
    losses = trainer.micro_step(batch.to(trainer.device))
    named = trainer.model.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    return {name: value for name, value in losses.items() if value.numel()}, gradients


def _muon(ours: Trainer, theirs: Trainer, batch: MicroBatch, report: Report) -> None:
    """Compare one step of Muon from equal gradients, with Newton-Schulz in fp32 and in bf16."""
    _step(theirs, batch)
    gradients = {name: one.grad.clone() for name, one in theirs.optimizer.muon.parameters.items()}
    true = _update(theirs, gradients, torch.float32)
    for dtype, limit in ((torch.float32, MUON_FP32), (torch.bfloat16, MUON_BF16)):
        worst, name = apart(_update(ours, gradients, dtype), true, floor=1e-3)
        report.check(worst <= limit, f"one step of Muon in {dtype}", f"{worst:.1e} {name}", f"<= {limit:g}")


def _update(trainer: Trainer, gradients: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what one step of Muon adds; the weights and the momentum are as before afterwards."""
    muon: Any = trainer.optimizer.muon
    usual = muon.dtype
    muon.dtype, muon.lr = dtype, 1.0
    before = {name: parameter.detach().clone() for name, parameter in muon.parameters.items()}
    momentum = {name: value.clone() for name, value in muon.momentum.items()}
    for name, parameter in muon.parameters.items():
        parameter.grad = gradients[name].to(parameter.device)
    muon.step()
    added = {name: (parameter.detach() - before[name]).cpu() for name, parameter in muon.parameters.items()}
    with torch.no_grad():
        for name, parameter in muon.parameters.items():
            parameter.copy_(before[name])
            muon.momentum[name].copy_(momentum[name])
            parameter.grad = None
    muon.dtype, muon.lr = usual, 0.0
    return added


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return dict(trainer.model.state_dict())


def _sample(ours: Trainer, theirs: Trainer, report: Report) -> None:
    """Draw with equal weights: what training made different is not the sampler's."""
    ours.model.load_state_dict(theirs.model.state_dict())
    bucket = next(iter(theirs.data.rows))
    conditions = theirs.data.conditions(theirs.data.rows[bucket][:2])
    width, height = map(int, bucket.split("x"))
    noise = torch.from_numpy(generator("check", "sample").standard_normal((2, 3, height, width)))
    drawn = [
        sample(trainer.model, conditions, noise, flow=trainer.config.flow, sampling=DRAWING)
        for trainer in (ours, theirs)
    ]
    worst, _ = apart({"x": drawn[0]}, {"x": drawn[1]}, floor=0)
    report.check(worst <= SAMPLE, f"a sample in {DRAWING.steps} steps", f"{worst:.1e}", f"<= {SAMPLE:g}")

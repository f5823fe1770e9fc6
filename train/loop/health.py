"""Whether a step is healthy: gradient norms, clipping, and what a number that is not finite leaves to look at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nanodit.errors import DataError
from nanodit.files import canonical_json, write_atomic
from train.checkpoint.checkpoint import checkpoint_steps
from train.loop.microbatch import Accumulated
from train.method.loss import Loss
from train.model.conditions import subset_name


class NonFiniteError(DataError):
    """A loss or gradient that is not a number; raised before the optimiser or the EMA was touched."""


def gradient_norms(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradient norms of each layer group (``blocks.NN`` or another part) and of all, on the device."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            head, _, rest = name.partition(".")
            group = f"blocks.{int(rest.split('.')[0]):02d}" if head == "blocks" else head
            groups.setdefault(group, []).append(parameter.grad)
    norms = {group: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g))) for group, g in groups.items()}
    return norms, torch.linalg.vector_norm(torch.stack(list(norms.values())))


def clip_gradients(model: nn.Module, total_norm: Tensor, limit: float) -> None:
    """Scale all gradients by one factor so that their joint norm is at most ``limit``."""
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, total_norm, foreach=True)


def report_non_finite(
    run_folder: Path, step: int, accumulated: Accumulated, losses: Collection[Loss], norms: Mapping[str, float]
) -> NonFiniteError:
    """Write what is known of a step's images into ``run_folder`` and return the error to raise.

    ``losses`` are those beside the flow loss, ``norms`` the gradient norms by layer group.
    """
    path = run_folder / f"non-finite-step-{step:06d}.json"
    values = accumulated.values
    written = {"loss": values["flow"], "velocity_norm": values["velocity"].sqrt()}
    written |= {f"{loss.name}_loss": values[loss.name] for loss in losses if loss.every_image}
    columns = {name: map(repr, tensor.tolist()) for name, tensor in written.items()}
    known = zip(accumulated.keys, accumulated.t.tolist(), accumulated.subsets, *columns.values())
    images = [
        {"key": key, "t": t, "conditions": subset_name(subset), **dict(zip(columns, measured))}
        for key, t, subset, *measured in known
    ]
    record = {
        "step": step,
        "images": images,
        **{f"{loss.name}_losses": [*map(repr, values[loss.name].tolist())] for loss in losses if not loss.every_image},
        "grad_norms": {group: repr(norm) for group, norm in norms.items()},
    }
    write_atomic(path, canonical_json(record))
    bad = [image["key"] for image in images if image["loss"] in ("nan", "inf")]
    kept = checkpoint_steps(run_folder)
    saved = f"the last checkpoint, {kept[0].name}, is intact" if kept else "there is no checkpoint yet"
    which = f"the loss of {len(bad)} images, {bad[0]} first" if bad else "the gradient's norm"
    return NonFiniteError(
        f"step {step}: {which}, is not finite. Optimiser and EMA were not touched; samples, t and norms are in "
        f"{path}. Look at these samples, or lower train.lr; {saved}"
    )

"""How fast the presets train, what bounds them (loader, copies or the device), and where the device's time goes."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nanodit.console import duration
from train.check.card import flop_rate
from train.check.made_up import data_of, preset, trainer_of
from train.check.report import Report, Setting, constant
from train.check.resume import saving
from train.check.timing import seconds_of
from train.config import TrainConfig
from train.data.prefetch import prefetch, thread_count
from train.hardware import can_compile, gpu_named
from train.loop.flops import flop_counter
from train.loop.microbatch import Accumulated, MicroBatch
from train.loop.trainer import Trainer
from train.plan import work as estimates
from train.plan.cost import phase_costs, range_on
from train.plan.memory import meta_trainer
from train.plan.rehearsal import Shapes
from train.plan.work import Work, count_work, seconds_on

# preset -> what of it: its first phase is of half the size
PRESETS = ("production-24gb", "baseline-24gb", "figures-256-24gb", "production-p16-24gb")
COMPILED = 3  # micro-batches that are compiled for
BATCHES = 6  # micro-batches, in which the buckets and dropped conditions of a run come up
THREADS = (1, 2, 4, 8, 16)
SECONDS = 12.0  # that a preset may take
KINDS = {
    "attention": ("attention", "flash", "cudnn_sdpa", "efficient"),
    "matrix products": ("mm", "conv", "linear", "matmul"),
}  # of operators, by a part of their names; all others are elementwise


def check(setting: Setting, report: Report) -> None:
    """Time micro-steps with batches on the device, with copies of them, and with the loader; then compiled."""
    ceiling = flop_rate(setting, torch.bfloat16 if setting.on_gpu else torch.float32)
    first: tuple[str, TrainConfig, Any, list[MicroBatch], float] | None = None
    for number, name in enumerate(PRESETS if not setting.tiny else ["tiny"]):
        if setting.left < SECONDS:
            report.note(name, "left out for want of time: --only speed --minutes 10 measures all")
            continue
        config = preset(setting, name, report)
        scales = [phase.scale for phase in config.train.phases] + [1.0]
        for scale in scales:
            whole = config.train.model_copy(update={"phases": []})
            phase = config.train.phases[:1] if scale != 1 else []
            one = config.model_copy(update={"train": whole.model_copy(update={"phases": phase})})
            called = name if len(scales) == 1 else f"{name} at {scale:g}"
            timed = _preset(setting, report, called, name, one, ceiling, thorough=number == 0)
            first = first or timed
            gc.collect()
            if setting.on_gpu:
                torch.cuda.empty_cache()
    if first:
        _compiled(setting, report, *first)  # last: how long that takes, nobody knows


def _preset(
    setting: Setting, report: Report, called: str, name: str, config: TrainConfig, ceiling: float, *, thorough: bool
) -> tuple[str, TrainConfig, Any, list[MicroBatch], float]:
    """Time a preset; return what compiling it needs."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_gb": 0.0})})
    data = data_of(setting, config, name)
    trainer = trainer_of(config, data, setting.device)
    numbers = list(islice(trainer.batches.numbers(0), BATCHES))
    made = _threaded(trainer, numbers, os.cpu_count() or 1)
    images = sum(len(batch.keys) for batch in made)

    trainer.flops = flop_counter(trainer.model, trainer.losses.values(), count_work)
    there = [batch.to(setting.device) for batch in made]
    _steps(trainer, there)  # warm
    trainer.flops.take()
    alone = seconds_of(lambda: _steps(trainer, there), setting.device)
    work = Work(*map(float, trainer.flops.take()))
    flops = work.flops / alone
    update = seconds_of(lambda: trainer.update(_accumulated(trainer, made[-1])), setting.device)
    of_step = alone / images + update / trainer.images_per_step
    report.note(
        f"{called}, device alone",
        f"{images / alone:.4g} images/s, {alone / len(made) * 1e3:.4g} ms a micro-step, update {update * 1e3:.4g} ms",
    )
    share = f"{flops / 1e12:.4g} TFLOP/s, {flops / ceiling:.3f} of what a large product reached here"
    report.note(f"{called}, work", share, preset=called, work=work, images=images, alone=alone)
    gpu = gpu_named(torch.cuda.get_device_name(setting.device)) if setting.on_gpu else None
    if gpu:
        least, most = seconds_on(gpu, work)
        middle, places = (least + most) / 2, (constant(estimates, "SLOW"), constant(estimates, "FAST"))
        bounds = {"low": least / middle, "high": most / middle}
        report.estimate(f"{called}, {len(made)} micro-steps", middle * 1e3, alone * 1e3, "ms", places, **bounds)
    packed = [_packed(trainer, number) for number in numbers]
    copied = seconds_of(lambda: _sent_steps(trainer, packed), setting.device)
    report.note(f"{called}, with copies", f"{images / copied:.4g} images/s")
    loaded = _with_loader(setting, trainer)
    report.note(f"{called}, with the loader", f"{loaded:.4g} images/s")
    rates = _loader_alone(setting, trainer, numbers)
    report.note(f"{called}, loader alone", ", ".join(f"{n} threads {rate:.4g} images/s" for n, rate in rates.items()))
    slowest = min((images / alone, "the device"), (images / copied, "copies"), (loaded, "the loader"))
    bound = slowest[1] if slowest[0] < 0.9 * images / alone else "the device"
    report.note(f"{called}, bound by", bound)
    steps, per_image = config.train.steps, of_step + max(0.0, 1 / loaded - alone / images)
    assumed = ""
    if gpu:
        phases = phase_costs(meta_trainer(config, data), Shapes.of(data.info, data.rows("train")))
        assumed = f", {' to '.join(map(duration, range_on(gpu, phases)))} by plan"
    whole = duration(steps * trainer.images_per_step * per_image)
    report.note(f"{called}, {steps} steps", f"{whole} at this rate{assumed}")
    if thorough:
        _profiled(setting, report, trainer, there[:3])
        seconds, size = saving(setting, trainer)
        report.note(f"{called}, checkpoint", f"{size / 1e9:.3g} GB in {seconds:.3g} s")
    return called, config, data, there[:COMPILED], images / alone


def _steps(trainer: Trainer, batches: Iterable[MicroBatch]) -> None:
    for batch in batches:
        trainer.micro_step(batch)


def _packed(trainer: Trainer, number: int) -> MicroBatch:
    """Make a micro-batch as a run does from its second one on: in a buffer that is large enough."""
    buffer = trainer.sender.buffer()
    trainer.batches.pack(number, buffer)
    return trainer.batches.pack(number, buffer.reset())


def _sent_steps(trainer: Trainer, batches: Iterable[MicroBatch]) -> int:
    """Compute micro-batches as a run does, copies included; returns their images."""
    images = 0
    for batch in batches:
        with trainer.sender.sent(batch) as sent:
            trainer.micro_step(sent)
        images += len(batch.keys)
    return images


def _accumulated(trainer: Trainer, batch: MicroBatch) -> Accumulated:
    values = {name: torch.ones(1, device=trainer.device) for name in ("flow", "velocity", *trainer.losses)}
    return Accumulated(batch.keys, batch.subsets, batch.t, values)


def _threaded(trainer: Trainer, numbers: Iterable[int], threads: int) -> list[MicroBatch]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(trainer.batches.make, numbers))


def _loader_alone(setting: Setting, trainer: Trainer, numbers: list[int]) -> dict[int, float]:
    """Return the images a second that so many threads make, as far as there are CPUs and time."""
    rates: dict[int, float] = {}
    for threads in THREADS:
        if threads > (os.cpu_count() or 1) or setting.left < SECONDS:
            break
        wanted = list(islice(cycle(numbers), max(threads, len(numbers) // (1 if threads > 1 else 3))))
        made: list[MicroBatch] = []
        seconds = seconds_of(lambda: made.extend(_threaded(trainer, wanted, threads)), torch.device("cpu"))  # noqa: B023
        rates[threads] = sum(len(batch.keys) for batch in made) / seconds
    return rates


def _with_loader(setting: Setting, trainer: Trainer) -> float:
    """Return the images a second of micro-steps as a run takes them, less the first, whose data is waited for."""
    images = 0
    data = trainer.config.data
    ahead = data.prefetch, thread_count(data.workers)
    with closing(prefetch(trainer._make_batch, trainer.batches.numbers(0), *ahead)) as batches:
        _sent_steps(trainer, [next(batches)])

        def train() -> None:
            nonlocal images
            images += _sent_steps(trainer, islice(batches, BATCHES))

        seconds = seconds_of(train, setting.device)
    return images / seconds


def _profiled(setting: Setting, report: Report, trainer: Trainer, batches: list[MicroBatch]) -> None:
    """Say what the device's time goes into, by kind and by operator."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as profiled:
        _steps(trainer, batches)
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
    events = profiled.key_averages()
    operators = [event for event in events if event.device_type == DeviceType.CPU and event.key.startswith("aten::")]
    time_of = lambda event: event.self_device_time_total if setting.on_gpu else event.self_cpu_time_total  # noqa: E731
    total = sum(map(time_of, operators)) or 1.0
    kinds: Counter[str] = Counter()
    for event in operators:
        kinds[kind_of(event.key)] += time_of(event)
    report.note("time by kind", ", ".join(f"{name} {share / total:.0%}" for name, share in kinds.most_common()))
    most = sorted(operators, key=time_of, reverse=True)[:8]
    report.note(
        "time by operator", ", ".join(f"{one.key[6:]} {time_of(one) / total:.0%} ({one.count})" for one in most)
    )
    attention = sorted({event.key for event in events if "attention" in event.key and event.key.startswith("aten::_")})
    report.note("kernels of attention", ", ".join(attention) or "none of its own")
    launches = sum(event.count for event in events if event.device_type == DeviceType.CUDA)
    if launches:
        report.note("launches", f"{launches / len(batches):.0f} a micro-step")


def kind_of(operator: str) -> str:
    """Return what an operator is, by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "elementwise")


def _compiled(
    setting: Setting, report: Report, called: str, config: TrainConfig, data: Any, there: list[MicroBatch], eager: float
) -> None:
    """Compile the blocks as ``train.compile`` does, and for a few static shapes; say what each costs and brings."""
    if not can_compile(setting.device.type) or setting.left < SECONDS:
        report.note(f"{called}, compiled", "left out: no compiler here, or no time left")
        return
    from torch._dynamo.utils import counters

    simple = sorted(there, key=lambda batch: (len(batch.groups), batch.keep_ids is not None))
    # a graph takes a CPU as long as all else of a rehearsal, which takes the one that no test of a run compiles
    for dynamic in (False,) if setting.tiny else (True, False):
        if setting.left < SECONDS:
            report.note(f"{called}, compiled, dynamic={dynamic}", "left out for want of time")
            continue
        counters.clear()
        torch._dynamo.reset()
        trainer = trainer_of(config, data, setting.device)
        trainer.model.compile_blocks(dynamic=dynamic)
        batches = simple[:1] if setting.tiny else there
        first = seconds_of(partial(_steps, trainer, batches), setting.device)
        graphs = counters["stats"]["unique_graphs"]
        later = seconds_of(partial(_steps, trainer, batches), setting.device)
        rate = sum(len(batch.keys) for batch in batches) / later
        report.note(
            f"{called}, compiled, dynamic={dynamic}",
            f"{rate:.4g} images/s, {later / len(batches) * 1e3:.4g} ms a micro-step, {rate / eager:.3g} times eager; "
            f"{graphs} graphs of {len(batches)} micro-batches took {(first - later) / max(1, graphs):.3g} s each",
        )

"""Command line: ``nanodit train run | plan | sample | sweep | export | gpu-check``, or ``python -m train``.

What imports torch is imported by the verbs: a signal in those seconds ends them as it does later, with exit code 75.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nanodit.allocator import let_segments_grow
from nanodit.config import load_config
from nanodit.console import say
from nanodit.errors import ConfigError, run_command, settled
from nanodit.openmp import let_threads_sleep
from nanodit.place import PACKAGES, claim
from nanodit.posix import require_posix

if TYPE_CHECKING:
    from prep.dataset.reader import Dataset
    from train.check.report import Report, Setting
    from train.config import TrainConfig
    from train.loop.trainer import Validate

CONFIG_HELP = "YAML, for example configs/train/quickstart.yaml"
STARTED = time.monotonic()
SELF_GUIDANCE = 3.0  # train.method.sampling.SELF_GUIDANCE
SAMPLER, STEPS, GRID = "dpm++2m", 12, "cosine"  # of train.method.sampling.DRAWING


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> None:
        claim(*PACKAGES)
        let_segments_grow()
        if options.verb in (_run, _sample):
            let_threads_sleep()
        options.verb(options)

    return run_command(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanodit train", description="Train NanoDiT, and draw images with it.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser(
        "run", help="train the model that a config describes, or continue training it", allow_abbrev=False
    )
    run.set_defaults(verb=_run)
    run.add_argument("--config", type=Path, required=True, help=CONFIG_HELP)
    run.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="auto (default): continue if there is a checkpoint; never: refuse a folder with a run; or a checkpoint",
    )  # fmt: skip
    run.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="a config key that may differ from the checkpoint's",
    )
    run.add_argument(
        "--allow-environment-change",
        action="store_true",
        help="continue although torch, threads or the processor differ",
    )
    run.add_argument(
        "--dataset-version", choices=("begun", "new"), default="begun",
        help="begun (default): a run goes on with the version of the dataset that it began on; new: with the newest, "
        "from the same place in the order of the data",
    )  # fmt: skip
    run.add_argument(
        "--max-hours", type=float, default=math.inf, metavar="H",
        help="this many hours after the start of the process, save and exit with 75; the same command continues",
    )  # fmt: skip
    run.add_argument(
        "--init-from", type=Path, metavar="CHECKPOINT",
        help="begin a new run with the averaged weights of another one, e.g. on other data or at another size",
    )  # fmt: skip
    run.add_argument("overrides", nargs="*", metavar="key.path=value")

    plan = verbs.add_parser("plan", help="say what a run will need, and whether it fits", allow_abbrev=False)
    plan.set_defaults(verb=_plan)
    plan.add_argument("--config", type=Path, required=True, help=CONFIG_HELP)
    plan.add_argument("--memory", metavar="24GB", help="memory of the GPU to plan for (default: of the GPU here)")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="measure memory and micro-steps with their data here (default with a GPU)",
    )
    plan.add_argument("--base", type=int, metavar="PIXELS", help="plan for a future dataset of this base")
    plan.add_argument("--json", action="store_true", help="print one JSON document")
    plan.add_argument("overrides", nargs="*", metavar="key.path=value")

    sample = verbs.add_parser("sample", help="draw images from a checkpoint", allow_abbrev=False)
    sample.set_defaults(verb=_sample)
    sample.add_argument(
        "--checkpoint", type=Path, required=True,
        help="a step folder, a run folder (its newest step), or a folder that `nanodit train export` wrote",
    )  # fmt: skip
    sample.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to draw; may be repeated")
    sample.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one per line")
    sample.add_argument(
        "--reference", "--reference-image", type=Path, metavar="IMAGE", help="a picture to resemble, as DINO sees it"
    )
    sample.add_argument(
        "--pose", type=Path, metavar="IMAGE|JSON",
        help="a picture of a person, or joints as JSON: COCO-WholeBody's 133 (train/draw/pose_file.py) or OpenPose's",
    )  # fmt: skip
    sample.add_argument("--key", help="draw from the stored conditions of this holdout sample instead")
    sample.add_argument("--dataset", help="the dataset that holds --key (default: that of the run's config)")
    sample.add_argument(
        "--conditions", metavar="text,pose", help="which of text, cls, patches, pose to use (default: all given ones)"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--count", type=int, default=1, help="images per prompt, from seed, seed + 1, ...")
    sample.add_argument("--batch-size", type=int, default=8, help="how many images are drawn together")
    sample.add_argument("--grid", action="store_true", help="also write one sheet: a row per prompt, a column per seed")
    size = sample.add_mutually_exclusive_group()
    size.add_argument(
        "--size", metavar="WxH",
        help="pixels (default: the bucket of the sample, of the pose or of the reference, or the base square)",
    )  # fmt: skip
    size.add_argument("--bucket", metavar="WxH", help="one of the sizes used in training")
    sample.add_argument("--sampler", choices=("heun", "euler", "dpm++2m"), default=SAMPLER)
    sample.add_argument("--steps", type=int, default=STEPS)
    sample.add_argument(
        "--time-grid", choices=("uniform", "cosine"), default=GRID,
        help="how the steps are spaced; cosine: closer together near the image, good for few steps",
    )  # fmt: skip
    sample.add_argument(
        "--guidance", type=float, default=1.0, help="scale of classifier-free guidance by all conditions; 1: none"
    )
    sample.add_argument(
        "--scale", action="append", default=[], metavar="NAME=NUMBER",
        help="a separate scale for text, dino or pose instead of --guidance, e.g. --scale text=3 --scale dino=1.5",
    )  # fmt: skip
    sample.add_argument(
        "--self-guidance", type=float, nargs="?", default=1.0, const=SELF_GUIDANCE, metavar="SCALE",
        help=f"guidance away from the routed network, for models trained with tread (no number: {SELF_GUIDANCE:g})",
    )  # fmt: skip
    sample.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="times, from 0 (image) to 1 (noise), between which guidance acts (default: 0 0.9)",
    )  # fmt: skip
    sample.add_argument(
        "--weights", default="ema", metavar="ema|model|posthoc:SIGMA_REL",
        help="the average (default), the last weights, or an average of another width, from the run's ema.snapshots",
    )  # fmt: skip
    sample.add_argument(
        "--encoder", action="append", default=[], metavar="NAME=PLACE",
        help="folder of t5 or dino, or ONNX file of detector or pose, if the dataset was made with models of your own",
    )  # fmt: skip
    sample.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sample.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="what the network computes in; tf32 and bf16 are faster on a GPU, and change the pictures a little",
    )  # fmt: skip
    sample.add_argument("--output", type=Path, required=True, help="PNG file; for several, -PROMPT-SEED is added")

    sweep = verbs.add_parser("sweep", help="train the arms of an ablation, each with several seeds", allow_abbrev=False)
    sweep.set_defaults(verb=_sweep)
    sweep.add_argument("--config", type=Path, required=True, help="YAML, for example configs/sweep/quick.yaml")
    sweep.add_argument(
        "--arms", metavar="B,D", help="only these, with what they inherit from others; --resume --arms adds more"
    )
    sweep.add_argument("--resume", action="store_true", help="continue a sweep that was killed; keeps finished trials")
    sweep.add_argument("--retry-failed", action="store_true", help="with --resume: also run failed trials again")
    sweep.add_argument(
        "--new-cohort", action="store_true", help="with --resume: continue although code, data or torch changed"
    )
    sweep.add_argument("--trial", metavar="ARM-seedN", help="run only this trial, here and without Ray")
    sweep.add_argument("--owned", action="store_true", help=argparse.SUPPRESS)  # ends with the process that started it
    sweep.add_argument("overrides", nargs="*", metavar="key.path=value")

    export = verbs.add_parser("export", help="write a model as a folder that diffusers loads", allow_abbrev=False)
    export.set_defaults(verb=_export)
    export.add_argument(
        "--checkpoint", type=Path, required=True, help="a step folder, or a run folder (its newest step)"
    )
    export.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet, or is empty")
    export.add_argument(
        "--weights", default="ema", metavar="ema|model|posthoc:SIGMA_REL", help="as for `nanodit train sample`"
    )
    export.add_argument(
        "--half", action="store_true", help="write bfloat16 (half the size), and say how much that changes the pixels"
    )
    export.add_argument(
        "--report", type=Path, metavar="report.json",
        help="the file that `nanodit evaluate run` wrote for this checkpoint; the model card's only source of figures",
    )  # fmt: skip
    export.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device for the comparison of --half"
    )

    check = verbs.add_parser(
        "gpu-check", help="prove on a new card what only a GPU can confirm, and measure the estimates of plan",
        allow_abbrev=False,
    )  # fmt: skip
    check.set_defaults(verb=_gpu_check)
    check.add_argument("--minutes", type=float, default=10.0, help="what may be measured within (default: 10)")
    check.add_argument("--json", type=Path, metavar="OUT", help="a file for a line per check; a summary beside it")
    check.add_argument("--only", metavar="A,B", help="some parts, e.g. memory,speed (default: all)")
    check.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    check.add_argument("--tiny", action="store_true", help="with --device cpu: a rehearsal on tiny networks")
    for option, kind in {"--part": str, "--folder": Path, "--seconds": float}.items():  # of the process of a part
        check.add_argument(option, type=kind, help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> None:
    require_posix("nanodit train run")
    from train.checkpoint.run_folder import check_still_there
    from train.config import TrainConfig
    from train.run import run

    if not options.max_hours > 0:
        raise ConfigError(f"--max-hours {options.max_hours:g}: must be more than 0")
    config = load_config(TrainConfig, options.config, options.overrides)
    check_still_there(options.config, config.run_folder, options.overrides)
    run(
        config, _build_validation,
        resume=options.resume, init_from=options.init_from, allow_change=options.allow_change,
        allow_environment_change=options.allow_environment_change,
        newest_version=options.dataset_version == "new", stop_at=STARTED + 3600 * options.max_hours,
    )  # fmt: skip


def _build_validation(config: TrainConfig, dataset: Dataset) -> Validate:
    """Return what the trainer calls to validate: it imports nothing of ``evaluate`` itself."""
    from evaluate.validation import build_validation

    return build_validation(config, dataset)


def _plan(options: argparse.Namespace) -> None:
    from train.plan.plan import plan

    if options.measure:
        require_posix("nanodit train plan --measure")
    plan(
        options.config, options.overrides,
        memory=options.memory, measured=options.measure, base=options.base, as_json=options.json,
    )  # fmt: skip


def _sample(options: argparse.Namespace) -> None:
    from train.draw.draw import DrawRequest, draw
    from train.hardware import pick_device
    from train.method.sampling import INTERVAL, Sampling

    names = (
        "reference", "pose", "key", "dataset", "seed", "count", "batch_size", "grid", "bucket", "weights", "output",
    )  # fmt: skip
    request = DrawRequest(
        **{name: getattr(options, name) for name in names},
        prompts=(*options.prompt, *_prompts(options.prompts)),
        conditions=None if options.conditions is None else options.conditions.replace(",", "+"),
        size=None if options.size is None else _size(options.size),
        sampling=Sampling(
            options.sampler, options.steps, options.guidance, _scales(options.scale), options.self_guidance,
            tuple(options.guidance_interval or INTERVAL), options.time_grid, options.precision,
        ),
        encoders=_pairs("--encoder", options.encoder, "PLACE"),
    )  # fmt: skip
    files = draw(options.checkpoint, request, pick_device(options.device))
    say(f"wrote {files[0]}" if len(files) == 1 else f"wrote {len(files)} files, {files[0]} to {files[-1]}")


def _prompts(file: Path | None) -> list[str]:
    """Read the lines of a file that are not empty."""
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ConfigError(f"--prompts {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {file}: not UTF-8 text ({error})") from None
    if not any(lines):
        raise ConfigError(f"--prompts {file}: holds no prompt")
    return [line for line in lines if line]


def _scales(values: list[str]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in _pairs("--scale", values, "NUMBER").items()}
    except ValueError:
        raise ConfigError(f"--scale {' --scale '.join(values)}: not of the form NAME=NUMBER, e.g. text=3") from None


def _pairs(option: str, values: list[str], what: str) -> dict[str, str]:
    """Read values of the form NAME=VALUE."""
    pairs: dict[str, str] = {}
    for given in values:
        name, _, value = given.partition("=")
        if not (name and value):
            raise ConfigError(f"{option} {given}: not of the form NAME={what}")
        if name in pairs:
            raise ConfigError(f"{option} {given}: {name} is given twice")
        pairs[name] = value
    return pairs


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size {text!r} is not of the form WIDTHxHEIGHT, e.g. 832x1216")
    return int(width), int(height)


def _sweep(options: argparse.Namespace) -> None:
    require_posix("nanodit train sweep")
    from train.sweep.process import end_with_parent

    if options.owned:
        end_with_parent()
    from evaluate import trial as measuring
    from train.run import run
    from train.sweep.trial import Work, run_trial

    def train(config: TrainConfig) -> None:
        run(config, _build_validation)

    work = Work(train, measuring.measure, measuring.resolve, measuring.check)
    if options.trial:
        from train.checkpoint.run_folder import check_still_there
        from train.sweep.config import load_sweep
        from train.sweep.plan import prepare

        if not options.owned:
            output = load_sweep(options.config, options.overrides).folder
            check_still_there(options.config, output, options.overrides)
        folder = prepare(options.config, options.overrides, options.trial, work)
        run_trial(folder, options.trial, work)
        say(f"wrote {folder / 'trials' / options.trial}")
        return
    from train.checkpoint.run_folder import check_still_there
    from train.sweep.config import load_sweep
    from train.sweep.sweep import run_sweep

    chosen = load_sweep(options.config, options.overrides)
    check_still_there(options.config, chosen.folder, options.overrides)
    run_sweep(
        chosen, work,
        arms=[name.strip() for name in options.arms.split(",")] if options.arms else [],
        resume=options.resume, retry_failed=options.retry_failed, new_cohort=options.new_cohort,
    )  # fmt: skip


def _export(options: argparse.Namespace) -> None:
    from train.draw.export import export
    from train.hardware import pick_device

    folder = export(
        options.checkpoint, options.output, weights=options.weights, half=options.half, report=options.report,
        device=pick_device(options.device),
    )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.rglob("*.*"))
    figures = f"with the figures of {options.report}" if options.report else "not evaluated (no --report)"
    say(f"wrote {folder}: {size / 1e6:.1f} MB for diffusers; model card README.md, {figures}")


def _gpu_check(options: argparse.Namespace) -> None:
    require_posix("nanodit train gpu-check")
    from train.check.run import Setting, gpu_check, run_part
    from train.hardware import pick_device

    more = {"evaluation": _check_evaluation}
    if options.device == "cpu" and not options.tiny:
        raise ConfigError("--device cpu: the sizes of real runs would take hours there; add --tiny")
    if options.part:
        setting = Setting(pick_device(options.device), options.tiny, options.folder, options.seconds)
        run_part(options.part, setting, more)
        return
    gpu_check(
        options.device, tiny=options.tiny, minutes=options.minutes, file=options.json, more=more,
        only=[name.strip() for name in options.only.split(",")] if options.only else [],
    )  # fmt: skip


def _check_evaluation(setting: Setting, report: Report) -> None:
    """Let evaluate's own judges compare what the device draws with what the CPU does."""
    from evaluate.metrics.pixels import psnr, ssim
    from train.check.sampling import judged

    judged(setting, report, {"PSNR": psnr, "SSIM": ssim})


if __name__ == "__main__":
    sys.exit(settled(main()))

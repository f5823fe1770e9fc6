"""Command line: ``python -m train run | sample``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from prep.config import dump_config, load_config
from prep.console import say
from prep.errors import ConfigError, run_command
from prep.files import write_atomic
from prep.shards import Dataset
from train.config import TrainConfig
from train.draw import DrawRequest, draw
from train.resume import check_same_run, choose_checkpoint
from train.runfolder import lock_run_folder
from train.sample import SELF_GUIDANCE
from train.tracking import environment, write_provenance
from train.trainer import Trainer, dataset_summary


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.verb(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train", description="Train NanoDiT, and draw images with it.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser("run", help="train, or continue training, what a config describes", allow_abbrev=False)
    run.set_defaults(verb=_run)
    run.add_argument("--config", type=Path, required=True)
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
    run.add_argument("overrides", nargs="*", metavar="key.path=value")

    sample = verbs.add_parser("sample", help="draw images from a checkpoint", allow_abbrev=False)
    sample.set_defaults(verb=_sample)
    sample.add_argument("--checkpoint", type=Path, required=True, help="a step folder, or a run folder for its newest")
    what = sample.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to draw")
    what.add_argument("--key", help="draw from the stored conditions of this holdout sample")
    sample.add_argument("--dataset", help="where --key is (default: the dataset of the run's config)")
    sample.add_argument(
        "--conditions", default=None, metavar="text,pose", help="which of the sample's conditions (default: all)"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--count", type=int, default=1, help="images, of seed, seed + 1, ...")
    sample.add_argument(
        "--size", default=None, metavar="WxH", help="pixels (default: the sample's, or the base square)"
    )
    sample.add_argument("--sampler", choices=("heun", "euler"), default="heun")
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1: none")
    sample.add_argument(
        "--self-guidance", type=float, nargs="?", default=1.0, const=SELF_GUIDANCE, metavar="SCALE",
        help=f"guidance away from the routed network, for models trained with tread ({SELF_GUIDANCE:g} if given alone)",
    )  # fmt: skip
    sample.add_argument(
        "--weights", default="ema", metavar="ema|model|posthoc:SIGMA_REL",
        help="the average (default), the last weights, or an average of another width, from the run's ema.snapshots",
    )  # fmt: skip
    sample.add_argument("--text-encoder", type=Path, help="folder of the T5 the captions went through, if it was one")
    sample.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sample.add_argument("--output", type=Path, required=True, help="PNG file; with --count, -SEED is added to its name")
    return parser


def _run(options: argparse.Namespace) -> None:
    config = load_config(TrainConfig, options.config, options.overrides)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    dataset = Dataset(config.dataset)
    run_folder = config.run_folder
    with lock_run_folder(run_folder):
        checkpoint = choose_checkpoint(run_folder, options.resume)
        step = 0
        if checkpoint is not None:
            check_same_run(
                checkpoint, config, dataset.fingerprint, environment(device),
                allowed_changes=options.allow_change, allow_environment_change=options.allow_environment_change,
            )  # fmt: skip
            step = checkpoint.state["step"]
            if step >= config.train.steps:
                say(f"{run_folder}: already trained to step {step}; nothing to do")
                return
        trainer = Trainer(config, dataset, device)
        if checkpoint is not None:
            trainer.load(checkpoint)
            say(f"continuing from {checkpoint.path}")
            del checkpoint  # as large as weights, average and optimiser together
        write_atomic(run_folder / "config.yaml", dump_config(config))
        write_provenance(run_folder, device, dataset_summary(dataset.info), step)
        trainer.run()
    say(f"wrote {run_folder}: {config.train.steps} steps, checkpoints/step-{config.train.steps:06d}")


def _sample(options: argparse.Namespace) -> None:
    names = (
        "prompt", "key", "dataset", "seed", "count", "sampler", "steps", "guidance", "self_guidance", "weights",
        "text_encoder", "output",
    )  # fmt: skip
    request = DrawRequest(
        **{name: getattr(options, name) for name in names},
        conditions=None if options.conditions is None else options.conditions.replace(",", "+"),
        size=None if options.size is None else _size(options.size),
    )
    files = draw(options.checkpoint, request, pick_device(options.device))
    say(f"wrote {', '.join(map(str, files))}")


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ConfigError(f"--size {text!r} is not of the form WIDTHxHEIGHT, e.g. 832x1216")
    return int(width), int(height)


def pick_device(name: str) -> torch.device:
    """Return the device of a config, ``auto`` being the GPU where torch sees one; :class:`ConfigError` without it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; install a torch build for it, or set the device to cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())

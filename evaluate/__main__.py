"""Command line: ``nanodit evaluate run | report``.

``python -m evaluate`` is the same where no other package of that name comes first; see :mod:`nanodit.place`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import quote

from nanodit.allocator import let_segments_grow
from nanodit.config import load_config
from nanodit.console import say
from nanodit.errors import ConfigError, SkippedError, run_command, settled
from nanodit.openmp import let_threads_sleep
from nanodit.place import PACKAGES, claim

TIERS = ("pulse", "table", "full")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> None:
        claim(*PACKAGES)
        let_segments_grow()
        if options.verb is _run:
            let_threads_sleep()
        options.verb(options)

    return run_command(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanodit evaluate",
        description="Say how good a checkpoint is, and how certain that is.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser("run", help="measure a checkpoint on the holdout of its dataset", allow_abbrev=False)
    run.set_defaults(verb=_run)
    run.add_argument("--checkpoint", type=Path, required=True, help="a step folder, or a run folder (its newest step)")
    amount = run.add_mutually_exclusive_group()
    amount.add_argument("--config", type=Path, help="YAML (default: configs/evaluate/base.yaml)")
    amount.add_argument("--tier", choices=TIERS, help="how thorough: configs/evaluate/TIER.yaml")
    run.add_argument("--tests", help="which tests, separated by commas (default: those of the config)")
    run.add_argument("--dataset", help="the dataset (default: that of the run's config)")
    run.add_argument(
        "--weights", default="ema", metavar="ema|model|posthoc:SIGMA_REL", help="as for `nanodit train sample`"
    )
    run.add_argument(
        "--output",
        type=Path,
        help="folder to write to (default: RUN/validation_outputs/step-NNNNNN; behind it -WEIGHTS for others than ema, "
        "and -dev with holdout=dev)",
    )
    run.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="of the model (default: that of the config)")
    run.add_argument("--strict", action="store_true", help="exit with 5 if any metric was skipped")
    run.add_argument("overrides", nargs="*", metavar="key.path=value")

    report = verbs.add_parser(
        "report",
        help="show evaluations, one or several side by side, as one HTML page, with JSON and CSV",
        allow_abbrev=False,
    )
    report.set_defaults(verb=_report)
    report.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="an evaluation's output folder, a run folder (its newest evaluation), or a sweep folder",
    )
    report.add_argument(
        "--output",
        type=Path,
        help="HTML file (default: report.html in the output folder; for several: in the current folder)",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    from evaluate.config import EvaluateConfig  # imports torch: --help should not wait for it
    from evaluate.report.summary import summary
    from evaluate.run import run

    file = options.config or (options.tier and f"configs/evaluate/{options.tier}.yaml")
    chosen = [f"tests=[{options.tests}]"] if options.tests else []
    chosen += [f"precision={options.precision}"] if options.precision else []
    config = load_config(EvaluateConfig, file, [*options.overrides, *chosen])
    folder, evidence = run(options.checkpoint, config, options.dataset, options.output, options.weights)
    for line in summary(evidence.metrics, evidence.skipped).splitlines():
        say(line)
    following = f"nanodit evaluate report {quote(str(folder))} --output report.html"
    say(f"wrote {folder}: report.json, samples.parquet. Next: {following}")
    if options.strict and evidence.skipped:
        names = ", ".join(skipped.name for skipped in evidence.skipped)
        raise SkippedError(f"--strict: {len(evidence.skipped)} metrics were skipped: {names}; the reasons are above")


def _report(options: argparse.Namespace) -> None:
    from evaluate.report.report import write_report
    from evaluate.sweep.report import is_sweep, write_sweep_report

    if any(map(is_sweep, options.folders)):
        if len(options.folders) > 1:
            raise ConfigError("a sweep has a page of its own; give its folder alone")
        page, record, table = write_sweep_report(options.folders[0], options.output)
        say(f"wrote {page}, {record.name} and {table.name} ({page.stat().st_size / 1e6:.1f} MB)")
        return
    page, record, table = write_report(options.folders, options.output)
    say(f"wrote {page}, {record.name} and {table.name} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(settled(main()))

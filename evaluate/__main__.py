"""Command line: ``nanodit evaluate run | compare | report``.

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
PROMPTS = 64


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if hasattr(options, "overrides") and not any(one.startswith("-") for one in more):
        options.overrides += more  # argparse loses what stands behind an option, where other words stood before it
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")

    def command() -> None:
        claim(*PACKAGES)
        let_segments_grow()
        if options.verb in (_run, _compare):
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
    _add_amount(run)
    run.add_argument("--tests", help="which tests, separated by commas (default: those of the config)")
    _add_source(run)
    run.add_argument(
        "--output",
        type=Path,
        help="folder to write to (default: RUN/validation_outputs/step-NNNNNN; behind it -WEIGHTS for others than ema, "
        "and -dev with holdout=dev)",
    )
    run.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="of the model (default: that of the config)")
    run.add_argument("--strict", action="store_true", help="exit with 5 if any metric was skipped")
    run.add_argument("overrides", nargs="*", metavar="key.path=value")

    compare = verbs.add_parser(
        "compare",
        help="draw the same prompts with two checkpoints, and make a page on which people choose blindly",
        allow_abbrev=False,
    )
    compare.set_defaults(verb=_compare)
    compare.add_argument(
        "checkpoints", type=Path, nargs=2, metavar="RUN", help="a step folder, or a run folder (its newest step)"
    )
    compare.add_argument("--page", type=Path, required=True, metavar="FILE.html", help="the page to write")
    compare.add_argument(
        "--prompts", type=_prompts, default=PROMPTS, metavar="N",
        help=f"holdout prompts, drawn from one noise each (default: {PROMPTS}, a vote of five minutes)",
    )  # fmt: skip
    compare.add_argument(
        "--conditions", default="text",
        help="what is given, such as text+pose, with the guidance that the config has for it (default: text)",
    )  # fmt: skip
    _add_amount(compare)
    _add_source(compare)
    compare.add_argument("overrides", nargs="*", metavar="key.path=value")

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
    report.add_argument(
        "--votes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="votes on the page that `nanodit evaluate compare` made of two of the runs, a file for each voter",
    )
    return parser


def _add_amount(parser: argparse.ArgumentParser) -> None:
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--config", type=Path, help="YAML (default: configs/evaluate/base.yaml)")
    amount.add_argument("--tier", choices=TIERS, help="how thorough: configs/evaluate/TIER.yaml")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="the dataset (default: that of the run's config)")
    parser.add_argument(
        "--weights", default="ema", metavar="ema|model|posthoc:SIGMA_REL", help="as for `nanodit train sample`"
    )


def _prompts(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 2")
    return int(text)


def _config_file(options: argparse.Namespace) -> Path | str | None:
    return options.config or (options.tier and f"configs/evaluate/{options.tier}.yaml")


def _run(options: argparse.Namespace) -> None:
    from evaluate.config import EvaluateConfig  # imports torch: --help should not wait for it
    from evaluate.report.summary import summary
    from evaluate.run import run

    chosen = [f"tests=[{options.tests}]"] if options.tests else []
    chosen += [f"precision={options.precision}"] if options.precision else []
    config = load_config(EvaluateConfig, _config_file(options), [*options.overrides, *chosen])
    folder, evidence = run(options.checkpoint, config, options.dataset, options.output, options.weights)
    for line in summary(evidence.metrics, evidence.skipped).splitlines():
        say(line)
    following = f"nanodit evaluate report {quote(str(folder))} --output report.html"
    say(f"wrote {folder}: report.json, samples.parquet. Next: {following}")
    if options.strict and evidence.skipped:
        names = ", ".join(skipped.name for skipped in evidence.skipped)
        raise SkippedError(f"--strict: {len(evidence.skipped)} metrics were skipped: {names}; the reasons are above")


def _compare(options: argparse.Namespace) -> None:
    from evaluate.blind import compare
    from evaluate.config import EvaluateConfig

    if taken := [one for one in options.overrides if one.partition("=")[0] == "samples"]:
        raise ConfigError(f"{taken[0]}: the number of prompts is --prompts")
    config = load_config(EvaluateConfig, _config_file(options), [*options.overrides, f"samples={options.prompts}"])
    page = options.page
    pairs, catches = compare(options.checkpoints, config, page, options.conditions, options.dataset, options.weights)
    say(
        f"wrote {page}: {pairs} pairs and {catches} catch trials, {page.stat().st_size / 1e6:.1f} MB. Open it in a "
        "browser, or send it to whoever is to vote. Next: nanodit evaluate report RUN RUN --votes FILE"
    )


def _report(options: argparse.Namespace) -> None:
    from evaluate.report.report import write_report
    from evaluate.sweep.report import is_sweep, write_sweep_report

    if any(map(is_sweep, options.folders)):
        if len(options.folders) > 1:
            raise ConfigError("a sweep has a page of its own; give its folder alone")
        if options.votes:
            raise ConfigError("--votes are on two runs; give these instead of the sweep")
        page, record, table = write_sweep_report(options.folders[0], options.output)
        say(f"wrote {page}, {record.name} and {table.name} ({page.stat().st_size / 1e6:.1f} MB)")
        return
    page, record, table = write_report(options.folders, options.output, options.votes)
    say(f"wrote {page}, {record.name} and {table.name} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(settled(main()))

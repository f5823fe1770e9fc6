"""Command line: ``nanodit prep``, or ``python -m prep``, with the verbs of :data:`VERBS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nanodit.config import load_config
from nanodit.console import say
from nanodit.errors import ConfigError, run_command, settled
from nanodit.files import check_writable
from nanodit.place import claim
from nanodit.posix import require_posix
from prep.config import PrepConfig

CONFIG_HELP = "YAML, for example configs/prep/production.yaml"


def parser() -> argparse.ArgumentParser:
    """Return the parser of every verb's arguments."""
    about = "Prepare a dataset from a folder of images."
    # a beginning of an option is no option: --prun must not drop samples
    top = argparse.ArgumentParser(prog="nanodit prep", description=about, allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        command.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
        return command

    run = verb("run", "make a dataset, or bring it up to date")
    run.add_argument(
        "--why", action="store_true", help="only say what would be computed and why, as `nanodit prep plan` does"
    )
    plan = verb(
        "plan",
        "say what a run would compute, why, where, in what time and with how many GB; computes nothing",
    )
    for command in (run, plan):
        command.add_argument("--prune", action="store_true", help="leave the samples out whose source files are gone")
        command.add_argument("--retry-rejects", action="store_true", help="try again the samples that a layer refused")
    doctor = verb("doctor", "look for what would stop a run on this machine or cluster, with a fix for each finding")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    report = verb("report", "write one offline HTML page that shows what is in a dataset")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the dataset")
    report.add_argument(
        "--source", type=Path, metavar="FOLDER",
        help="where the images come from, for pictures of those that were refused (with --config: that of the config)",
    )  # fmt: skip
    verify = verb("verify", "prove that a dataset is whole: hashes, schema, no leaks, no orphans")
    verify.add_argument("--repair", action="store_true", help="discard damaged units; the next run computes them again")
    verify.add_argument("--full", action="store_true", help="compare all class tokens, also those that a run compared")
    export = verb("export", "write a dataset in another layout")
    export.add_argument("--flat", type=Path, metavar="OUT", required=True, help="folder for one tar per shard")
    kept = verbs.add_parser(
        "versions", help="list the versions of a dataset that can be read, and drop some", allow_abbrev=False,
        description="List the versions of a dataset with the bytes that are kept for them, and who reads them. What "
        "prep run replaces or prunes stays readable for trainings that began on it, until its version is dropped here.",
    )  # fmt: skip
    kept.add_argument("dataset", metavar="DATASET", help="a folder, or the URL of an object store")
    which = kept.add_mutually_exclusive_group()
    which.add_argument("--drop", metavar="FINGERPRINT", help="drop this version; the first digits suffice")
    which.add_argument("--older-than", metavar="30d", help="drop the versions published more days ago, not the newest")
    kept.add_argument("--yes", action="store_true", help="do not ask before dropping")
    left_out = verbs.add_parser(
        "exclude", help="leave samples out of the next version, or take them in again", allow_abbrev=False,
        description="Leave samples out of the next version that prep run publishes. Nothing is deleted: with --include "
        "they come back. Without names the excluded samples are listed.",
    )  # fmt: skip
    left_out.add_argument("dataset", metavar="DATASET", help="a folder, or the URL of an object store")
    left_out.add_argument(
        "names", nargs="*", metavar="SAMPLE", help="its key, the first digits of it, or its file below the source"
    )
    left_out.add_argument("--include", action="store_true", help="take these samples in again")
    captions = verbs.add_parser(
        "captions", help="list a dataset's captions, or write a model's to files, to be mended", allow_abbrev=False,
        description="List the captions of a dataset, or write those that a model made to NAME.txt files. A file that a "
        "person changes is taken by the next prep run, and stays when another model writes the others.",
    )  # fmt: skip
    captions.add_argument("dataset", metavar="DATASET", help="a folder, or the URL of an object store")
    what = captions.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="one line for each caption")
    what.add_argument("--write-txt", action="store_true", help="write a model's captions to NAME.txt files")
    captions.add_argument("--flagged", action="store_true", help="with --list: only the doubtful ones, with reasons")
    place = captions.add_mutually_exclusive_group()
    place.add_argument("--source", type=Path, metavar="FOLDER", help="write beside the images, which lie here")
    place.add_argument("--to", type=Path, metavar="FOLDER", help="write below this folder instead")
    for command in (report, verify, export):
        command.add_argument("--dataset", metavar="PLACE", help="the dataset; default: the output of the config")
    for command in (run, plan, doctor, report, verify, export):
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example source=photos")
    figures = verbs.add_parser(
        "figures", help="draw the built-in dataset: people with captions and known truth", allow_abbrev=False
    )
    figures.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    figures.add_argument("--count", type=int, required=True, help="number of figures")
    figures.add_argument("--size", type=int, required=True, help="image area is about SIZE x SIZE pixels")
    figures.add_argument("--seed", type=int, default=0, help="equal seeds give equal figures (default: 0)")
    figures.add_argument("--short-captions", action="store_true", help="about 50 words instead of up to 200")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb, and return the exit code."""
    options = parser().parse_args(arguments)
    claim("prep")
    changing = ("repair", "drop", "older_than", "write_txt")
    writes = next((name for name in changing if getattr(options, name, None)), None)
    if options.verb in ("run", "plan", "doctor", "exclude") or writes:
        require_posix(f"nanodit prep {options.verb}{f' --{writes}'.replace('_', '-') if writes else ''}")
    return VERBS[options.verb](options) or 0


def _figures(options: argparse.Namespace) -> None:
    from prep.figures.figures import write_figures

    check_writable(options.out, "folder", folder=True)
    write_figures(options.out, options.count, options.size, options.seed, options.short_captions)
    say(f"wrote {options.count} figures to {options.out}")


def _run(options: argparse.Namespace) -> None:
    from prep import run

    config = load_config(PrepConfig, options.config, options.overrides)
    action = run.print_plan if options.verb == "plan" or options.why else run.run
    action(config, prune=options.prune, retry_rejects=options.retry_rejects)


def _doctor(options: argparse.Namespace) -> int:
    from prep.doctor.doctor import doctor

    # a machine may be looked at before there is anything to prepare
    given = options.overrides if options.config else [f"{name}=." for name in ("source", "output")] + options.overrides
    return doctor(load_config(PrepConfig, options.config, given), as_json=options.json)


def _report(options: argparse.Namespace) -> None:
    from prep.report.report import write_report

    if options.output:
        check_writable(options.output)
    source = options.source
    if source is None and options.config:
        source = Path(load_config(PrepConfig, options.config, options.overrides).source)
    if source is not None and not source.is_dir():
        raise ConfigError(f"--source {source}: is not a folder")
    say(f"wrote {write_report(_dataset(options), options.output, source)}")


def _verify(options: argparse.Namespace) -> None:
    from prep.verify.verify import verify

    verify(_dataset(options), repair=options.repair, full=options.full)


def _versions(options: argparse.Namespace) -> None:
    from prep.versions import show_versions

    show_versions(options.dataset, options.drop, options.older_than, options.yes)


def _captions(options: argparse.Namespace) -> None:
    from prep.caption_files import list_captions, write_captions

    if options.list:
        if options.source or options.to:
            raise ConfigError("--source and --to say where --write-txt writes; leave them out with --list")
        list_captions(options.dataset, options.flagged)
        return
    if options.flagged:
        raise ConfigError("--flagged belongs to --list")
    folder = options.source or options.to
    if folder is None:
        raise ConfigError("where to? Give --source FOLDER, the folder with the images, or --to FOLDER")
    check_writable(folder, "--source" if options.source else "--to", folder=True)
    write_captions(options.dataset, folder, beside=options.source is not None)


def _exclude(options: argparse.Namespace) -> None:
    from prep.exclude import exclude

    exclude(options.dataset, options.names, options.include)


def _export(options: argparse.Namespace) -> None:
    from prep.export import export_flat

    check_writable(options.flat, "--flat", folder=True)
    export_flat(_dataset(options), options.flat)


def _dataset(options: argparse.Namespace) -> str:
    """Return the dataset that a verb is about, named by ``--dataset`` or by a config."""
    if options.dataset:
        if options.config or options.overrides:
            raise ConfigError("--dataset names the dataset already; leave out --config and key=value")
        return options.dataset
    if not options.config and not any(text.startswith("output=") for text in options.overrides):
        raise ConfigError(
            f"which dataset? Give --dataset PLACE, or --config FILE as for nanodit prep run ({CONFIG_HELP})"
        )
    overrides = options.overrides if options.config else ["source=.", *options.overrides]
    return load_config(PrepConfig, options.config, overrides).output


VERBS = {
    "run": _run,
    "plan": _run,
    "figures": _figures,
    "doctor": _doctor,
    "report": _report,
    "verify": _verify,
    "versions": _versions,
    "captions": _captions,
    "exclude": _exclude,
    "export": _export,
}

if __name__ == "__main__":
    sys.exit(settled(run_command(main)))

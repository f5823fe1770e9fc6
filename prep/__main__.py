"""Command line of prep: ``python -m prep run | figures``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prep.config import load_config
from prep.console import say
from prep.errors import run_command
from prep.settings import PrepConfig


def parser() -> argparse.ArgumentParser:
    """The arguments of every verb."""
    top = argparse.ArgumentParser(prog="python -m prep", description="Prepare a dataset from a folder of images.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser("run", help="make a dataset, or bring it up to date")
    run.add_argument("--config", type=Path, metavar="FILE", help="YAML, for example configs/prep/production.yaml")
    run.add_argument("--why", action="store_true", help="only say what would be computed and why")
    run.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example source=photos base=512")
    figures = verbs.add_parser("figures", help="draw the built-in dataset of people with captions and known truth")
    figures.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    figures.add_argument("--count", type=int, required=True, help="number of figures")
    figures.add_argument("--size", type=int, required=True, help="image area is about SIZE x SIZE pixels")
    figures.add_argument("--seed", type=int, default=0, help="equal seeds give equal figures (default: 0)")
    figures.add_argument("--short-captions", action="store_true", help="about 50 words instead of up to 200")
    return top


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run one verb."""
    options = parser().parse_args(arguments)
    if options.verb == "figures":
        from prep.figures import write_figures

        write_figures(options.out, options.count, options.size, options.seed, options.short_captions)
        say(f"wrote {options.count} figures to {options.out}")
        return 0
    config = load_config(PrepConfig, options.config, options.overrides)
    from prep import run

    if options.why:
        run.explain(config)
    else:
        run.run(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

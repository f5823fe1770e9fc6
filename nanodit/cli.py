"""The command ``nanodit prep | train | evaluate``: the same as ``python -m`` with that package, from any folder.

A package is imported when it is asked for, inside :func:`nanodit.errors.run_command`, so that a signal in those seconds
ends the command as it does later.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nanodit import __version__
from nanodit.errors import run_command, settled
from nanodit.place import PROJECT, claim

COMMANDS = {
    "prep": "make a dataset from a folder of images, check it and show it",
    "train": "train a model on a dataset, alone or in a sweep; draw with it; export it",
    "evaluate": "measure a model, and show what was measured",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of one package and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = _parser().parse_args(given[:1]).command  # what follows is for the package's own parser
    code = run_command(lambda: _package(name, given[1:]))
    return settled(code) if arguments is None else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanodit",
        description="Train a text-to-image diffusion transformer from scratch, and measure it.",
        epilog=f"nanodit COMMAND --help says more. Configs to start from are in {PROJECT / 'nanodit' / 'configs'}.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nanodit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _package(name: str, arguments: list[str]) -> int:
    claim(name)
    return importlib.import_module(f"{name}.__main__").main(arguments)

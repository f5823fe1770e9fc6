"""Where the project stands, and a guard against other code that bears the names of its packages.

``evaluate`` is also a package of Hugging Face, and ``train.py`` a file in many a working directory. Python takes what
comes first on its path, and of two wheels with a file of the same name the one that was installed last. So every
command claims its packages before it imports from them (:func:`claim`).

One case is out of reach: where another ``evaluate`` comes first, ``python -m evaluate`` starts that one, and no line of
this project runs. ``nanodit evaluate`` starts ours there too.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from nanodit import __version__
from nanodit.errors import ConfigError

PROJECT = Path(__file__).parents[1]  # the folder that holds the packages: a clone, or site-packages
PACKAGES = ("prep", "train", "evaluate")


def claim(*packages: str) -> None:
    """Make ``import NAME`` mean the project's own package of that name, in this process and those it spawns.

    Puts the project first on ``sys.path`` where anything else is found before it. Raises :class:`ConfigError` where the
    name was imported already and is not ours, and where another package's wheel has overwritten files of ours.
    """
    if any(map(shadow, packages)):
        sys.path.insert(0, str(PROJECT))
    for name in packages:
        if other := shadow(name):
            raise ConfigError(f"{name} is {other} here, not the one in {PROJECT}. Run `nanodit {name}` instead")
    if damage := overwritten(*packages):
        raise ConfigError(": ".join(damage))


def shadow(name: str) -> str:
    """Return what ``import name`` gives if that is not the project's own package, "" if it is; imports nothing."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a specification, which only a program can have made
        spec = None
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin]
    place = next(iter(places), "missing")
    return "" if os.path.realpath(place) == os.path.realpath(PROJECT / name) else str(place)


def hides(folder: str) -> bool:
    """Return whether ``folder``, first on the path of Python, would hide a package of the project."""
    elsewhere = os.path.realpath(folder) != os.path.realpath(PROJECT)
    return elsewhere and any(PathFinder.find_spec(name, [folder]) for name in ("nanodit", *PACKAGES))


def overwritten(*packages: str) -> tuple[str, str] | None:
    """Return which modules at the top of ``packages`` are not what was installed, and what to do; None if all are.

    The hashes of an installed wheel are in the RECORD beside it (PyPA, "Recording installed projects"); a clone has
    none, and may be changed.
    """
    try:
        record = (PROJECT / f"nanodit-{__version__}.dist-info" / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return None
    damaged = []
    for line in record.splitlines():
        file, digest, _ = line.rsplit(",", 2)
        package, _, module = file.partition("/")
        if package in packages and module.endswith(".py") and "/" not in module and digest != _digest(PROJECT / file):
            damaged.append(file)
    if not damaged:
        return None
    found = f"{' and '.join(damaged)} in {PROJECT} are not from nanodit"
    again = "run pip install --force-reinstall --no-deps with the wheel, folder or URL that nanodit came from"
    others = [place.parent.stem for place in PROJECT.glob("*.dist-info/RECORD") if _claims(place, damaged)]
    if not others:
        return found, again
    return f"{found} but were overwritten by {' and '.join(others)}", f"uninstall that, then {again}"


def _digest(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError:
        return "missing"
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _claims(record: Path, files: list[str]) -> bool:
    """Return whether another distribution's RECORD lists one of ``files`` too."""
    if record.parent.name.startswith("nanodit-"):
        return False
    try:
        lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return not {line.partition(",")[0] for line in lines}.isdisjoint(files)


def child_command(module: str) -> list[str]:
    """Return the beginning of a command that runs a module of the project; for :func:`child_environment`.

    ``-P`` keeps the working directory, where anything may lie, off the path.
    """
    return [sys.executable, "-P", "-m", module]


def child_environment(**more: str) -> dict[str, str]:
    """Return this process's environment with ``more`` in it and the project first on the path of Python."""
    path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    return os.environ | more | {"PYTHONPATH": path}

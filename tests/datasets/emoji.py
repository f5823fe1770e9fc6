"""Drawings of others with words of others: emoji of several icon sets, one picture and one caption for each.

``python -m tests.datasets.emoji --output FOLDER [--styles noto twemoji fluent openmoji] [--size 96]``: packages of the
npm registry, fetched by ``npm pack`` at pinned versions, whose SVG resvg draws (``pip install resvg-py``). Writes
STYLE-CODEPOINTS.png and .txt, ``emoji.csv`` (which emoji, which style), ``words.txt`` (for ``t5.words``), and
``LICENCES.md``, which has to go wherever the pictures go. See docs/emoji.md.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError, NanoditError

SIZE = 96
TABLE, WORDS, LICENCES = "emoji.csv", "words.txt", "LICENCES.md"
COLUMNS = ("file_name", "emoji", "name", "style")  # prep's split.csv wants the first


@dataclass(frozen=True)
class IconSet:
    """A package of icons in Iconify's JSON, and the word by which captions call its style.

    ``integrity`` is npm's: "sha512-" and the digest of the tarball in base64. ``licence`` is an SPDX identifier.
    """

    style: str
    package: str
    version: str
    licence: str
    integrity: str

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# Another package of this kind, @iconify-json/fxemoji, does not say which emoji its icons are.
ICON_SETS = (
    IconSet(
        "noto", "@iconify-json/noto", "1.2.9", "Apache-2.0",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    IconSet(
        "twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    IconSet(
        "fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    IconSet(
        "openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
)  # fmt: skip
STYLES = ("noto", "twemoji", "fluent")  # by default: pictures in the style of OpenMoji are share-alike

# Names are slugs without apostrophes.
SPELT = {"oclock": "o'clock", "womans": "woman's", "mans": "man's"}
# An article or a plural cannot be told from a name ("grapes", "eyes", "people holding hands"), so no sentence needs it.
TEMPLATES = (
    "{Name}, drawn in the style of {style}.",
    "An emoji in the style of {style}: {name}.",
    "{Style} draws this emoji: {name}.",
    "A flat drawing of the emoji {name}, in the style of {style}.",
)


@dataclass(frozen=True)
class Drawing:
    """One emoji of one style. ``emoji`` are its code points in hexadecimal, joined by hyphens, "1f34e" for an apple."""

    emoji: str
    name: str
    style: str
    svg: str

    @property
    def stem(self) -> str:
        """Name of its files without suffix."""
        return f"{self.style}-{self.emoji}"

    @property
    def caption(self) -> str:
        """What and which style, in one of a few wordings."""
        template = TEMPLATES[hashlib.sha256(self.stem.encode()).digest()[0] % len(TEMPLATES)]
        both = {"name": self.name, "style": self.style}
        return template.format(**both, **{key.capitalize(): value.capitalize() for key, value in both.items()})


def fetch(icons: IconSet, folder: Path) -> Path:
    """Return the tarball of a package, fetched into ``folder`` by npm unless it is there.

    npm knows the registry and the proxy of the machine. Raises :class:`ConfigError` where it is missing or fails,
    :class:`DataError` for a file that is not the one of the pinned version.
    """
    path, name = folder / icons.tarball, f"{icons.package}@{icons.version}"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder.absolute()), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ConfigError(
                f"cannot start npm, which fetches {name} ({error}). Install it, or make {icons.tarball} by "
                f"`npm pack {name}` on another machine and put it into {folder}"
            ) from error
        if done.returncode or not path.is_file():
            said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
            raise ConfigError(f"npm could not fetch {name} into {folder}: {said}")
    found = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != icons.integrity:
        raise DataError(f"{path} is not {name}: it has {found}, not {icons.integrity}. Delete it and run this again")
    return path


def read_package(path: Path) -> dict[str, Any]:
    """Return ``icons``, ``chars`` and ``info`` of an icon set's tarball; raises :class:`DataError` for another file."""
    try:
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(f"package/{name}.json") for name in ("icons", "chars", "info")}
            return {name: json.load(file) for name, file in files.items() if file is not None}
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no package of icons with icons.json, chars.json and info.json: {error}") from error


def is_drawn(emoji: str) -> bool:
    """Whether an emoji is one of the dataset's: no skin tone, and no flag of a country or region.

    The five tones of a person are near copies of the yellow one, which stays: all of them would make two thirds of the
    set people, and link or leak across the split. What a flag shows cannot be told from those of other countries.
    """
    points = [int(point, 16) for point in emoji.split("-")]
    return not any(
        0x1F3FB <= point <= 0x1F3FF or 0x1F1E6 <= point <= 0x1F1FF or 0xE0020 <= point <= 0xE007F for point in points
    )


def drawings(packages: Mapping[str, Mapping[str, Any]]) -> list[Drawing]:
    """Return the emoji that at least two styles draw, in the order of the styles and of their code points.

    ``packages`` maps a style to what :func:`read_package` returns. All styles call an emoji by the name that the first
    of them has for it, so that text says what it is in the same words whatever the style. An emoji of one style alone
    could not show whether what is drawn and how it is drawn are told apart.
    """
    names: dict[str, str] = {}
    icon_of: dict[tuple[str, str], str] = {}
    for style, package in packages.items():
        for points, icon in sorted(package["chars"].items()):
            emoji = points.replace("-fe0f", "")  # which only asks for colours
            if is_drawn(emoji) and (style, emoji) not in icon_of:
                icon_of[style, emoji] = icon
                names.setdefault(emoji, " ".join(SPELT.get(word, word) for word in icon.split("-")))
    styles = Counter(emoji for _, emoji in icon_of)
    return [
        Drawing(emoji, names[emoji], style, svg(packages[style]["icons"], icon))
        for (style, emoji), icon in icon_of.items()
        if styles[emoji] > 1
    ]


def svg(icons: Mapping[str, Any], name: str) -> str:
    """Return an icon of Iconify's JSON as SVG; raises :class:`DataError` for one that is not there."""
    try:
        icon = icons["icons"][name]
    except KeyError:
        raise DataError(f"{icons.get('prefix')} names the icon {name}, which it does not have") from None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def draw(drawing: Drawing, size: int) -> bytes:
    """Return a drawing as PNG of ``size`` pixels a side, on white.

    White and nothing else: what a few thousand pictures can teach is what is drawn and how, and a colour drawn per
    picture would say nothing of either. It would also hide near copies from the split, which compares small pictures.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ConfigError(f"resvg, which draws SVG, is not installed ({error}): pip install resvg-py") from error
    sized = drawing.svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=sized, background="white", skip_system_fonts=True))
    except ValueError as error:
        raise DataError(f"{drawing.stem} ({drawing.name}): resvg cannot draw it: {error}") from error


def write(output: Path, found: Sequence[Drawing], size: int = SIZE) -> None:
    """Write pictures, captions, words and the table, which comes last; the same bytes every time.

    Raises :class:`ConfigError` where the folder has pictures of other emoji.
    """
    output.mkdir(parents=True, exist_ok=True)
    if others := {path.name for path in output.glob("*.png")} - {f"{one.stem}.png" for one in found}:
        raise ConfigError(f"{output} has {len(others)} other pictures, {min(others)} for one: give a folder of its own")
    with Progress("emoji", len(found), "pictures") as progress:
        for one in found:
            (output / f"{one.stem}.png").write_bytes(draw(one, size))
            (output / f"{one.stem}.txt").write_text(f"{one.caption}\n", encoding="utf-8")
            progress.advance()
    (output / WORDS).write_text("\n".join(words(one.caption for one in found)) + "\n", encoding="utf-8")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows((f"{one.stem}.png", one.emoji, one.name, one.style) for one in found)
    (output / TABLE).write_text(table.getvalue(), encoding="utf-8")


def words(captions: Iterable[str]) -> list[str]:
    """Return the words of captions in small letters, sorted, each once."""
    return sorted({word.strip(".,:").lower() for caption in captions for word in caption.split()})


def licences(sets: Sequence[IconSet], packages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of whose drawings these are."""
    lines = ["| style | drawn by | licence | text of the licence | package |", "|---|---|---|---|---|"]
    for icons in sets:
        info = packages[icons.style]["info"]
        author = f"{info['author']['name']}, {info['author'].get('url', '')}"
        lines.append(
            f"| {icons.style} | {author} | {icons.licence} | {info['license'].get('url', '')} "
            f"| {icons.package} {icons.version} |"
        )
    return "\n".join(lines) + "\n"


def make(output: Path, sets: Sequence[IconSet], size: int = SIZE) -> list[Drawing]:
    """Fetch the packages into ``output/packages``, and write the dataset of their drawings."""
    packages = {icons.style: read_package(fetch(icons, output / "packages")) for icons in sets}
    found = drawings(packages)
    (output / LICENCES).write_text(licences(sets, packages), encoding="utf-8")
    write(output, found, size)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    every = [icons.style for icons in ICON_SETS]
    parser.add_argument("--styles", nargs="+", choices=every, default=STYLES, help="two at least")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side")
    options = parser.parse_args()
    try:
        found = make(options.output, [icons for icons in ICON_SETS if icons.style in options.styles], options.size)
    except NanoditError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    counts = Counter(one.style for one in found)
    say(f"wrote {len(found)} pictures to {options.output}: {', '.join(f'{n} {style}' for style, n in counts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

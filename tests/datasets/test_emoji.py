"""The two datasets of others' pictures, from a package of three icons and photographs that are made here."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanodit.config import load_config
from nanodit.errors import ConfigError, DataError
from prep.config import PrepConfig
from prep.encoders.demo import known_words, pieces
from prep.passes.grouping import name_groups
from tests.datasets import crops, emoji
from tests.datasets.emoji import Drawing, IconSet, drawings, fetch, make, read_package, words

APPLE, GRAPES, WAVING, ONE_OCLOCK = "1f34e", "1f347", "1f44b", "1f550"
SQUARE = '<path fill="#{}" d="M4 4h24v24H4z"/>'


def icon_set(folder: Path, style: str, chars: dict[str, str]) -> IconSet:
    """Write the tarball of a package whose icons are squares of colours of their own, and return what it is."""
    icons = {
        name: {"body": SQUARE.format(hashlib.sha256(f"{style} {name}".encode()).hexdigest()[:6])}
        for name in chars.values()
    }
    info = {"author": {"name": "A. Painter", "url": "https://example.org"}, "license": {"url": f"{style}.org/licence"}}
    files = {"icons": {"prefix": style, "width": 32, "height": 32, "icons": icons}, "chars": chars, "info": info}
    made = IconSet(style, f"@icons/{style}", "1.0.0", "CC-BY-4.0", "")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / made.tarball, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    digest = hashlib.sha512((folder / made.tarball).read_bytes()).digest()
    return replace(made, integrity="sha512-" + base64.b64encode(digest).decode())


@pytest.fixture
def sets(tmp_path) -> list[IconSet]:
    """Two styles that share three emoji, one of them under two names; and what a dataset leaves out."""
    folder = tmp_path / "emoji" / "packages"
    shared = {APPLE: "red-apple", GRAPES: "grapes", ONE_OCLOCK: "one-oclock"}
    toned = {f"{WAVING}-1f3fb": "waving-hand-light-skin-tone", "1f1eb-1f1f7": "flag-france"}
    return [
        icon_set(folder, "noto", {**shared, **toned, WAVING: "waving-hand"}),
        icon_set(folder, "fluent", {**shared, **toned, APPLE: "apple", "1f34d": "pineapple"}),
    ]


def read(sets: list[IconSet], folder: Path) -> list[Drawing]:
    return drawings({icons.style: read_package(fetch(icons, folder / "emoji" / "packages")) for icons in sets})


def test_emoji_that_two_styles_draw_have_one_name_and_no_tones_or_flags(sets, tmp_path):
    found = read(sets, tmp_path)
    assert [(one.style, one.name) for one in found] == [
        ("noto", "grapes"), ("noto", "red apple"), ("noto", "one o'clock"),
        ("fluent", "grapes"), ("fluent", "red apple"), ("fluent", "one o'clock"),
    ]  # fmt: skip


def test_captions_say_what_and_which_style_in_several_wordings(sets, tmp_path):
    found = read(sets, tmp_path)
    for one in found:
        assert one.name in one.caption.lower()
        assert one.style in one.caption.lower()
        assert one.caption == replace(one, svg="").caption  # a function of the emoji and the style
    many = {Drawing(f"{point:x}", "x", "noto", "").caption for point in range(100)}
    assert many == {
        "X, drawn in the style of noto.", "An emoji in the style of noto: x.", "Noto draws this emoji: x.",
        "A flat drawing of the emoji x, in the style of noto.",
    }  # fmt: skip
    captions = [one.caption for one in found]
    known = {piece for piece, _ in pieces(words(captions))}
    assert {f"▁{word.strip('.,:')}" for caption in captions for word in caption.split()} <= known  # none is spelt


def test_a_dataset_has_the_same_bytes_twice_and_says_whose_drawings_it_has(sets, tmp_path, monkeypatch):
    drawn = []
    try:
        import resvg_py  # noqa: F401
    except ImportError:  # an option of this script alone; the rest of it is tested all the same
        monkeypatch.setattr(emoji, "draw", lambda one, size: drawn.append(size) or one.svg.encode())
    output = tmp_path / "emoji"
    files = []
    for _ in range(2):
        make(output, sets, size=24)
        files.append({path.name: path.read_bytes() for path in output.iterdir() if path.is_file()})
    assert files[0] == files[1]
    table = list(csv.DictReader(io.StringIO(files[0][emoji.TABLE].decode())))
    assert [(row["emoji"], row["style"]) for row in table] == [
        (point, style) for style in ("noto", "fluent") for point in (GRAPES, APPLE, ONE_OCLOCK)
    ]
    pictures = {row["file_name"] for row in table}
    texts = {f"{Path(name).stem}.txt" for name in pictures}
    assert files[0].keys() == pictures | texts | {emoji.TABLE, emoji.WORDS, emoji.LICENCES}
    assert len({files[0][name] for name in pictures}) == 6
    if not drawn:
        assert {Image.open(output / name).size for name in pictures} == {(24, 24)}
        assert Image.open(output / min(pictures)).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert {"red", "apple", "one", "o'clock", "noto"} <= {*known_words(str(output / emoji.WORDS))}
    licences = files[0][emoji.LICENCES].decode()
    for icons in sets:
        line = next(line for line in licences.splitlines() if line.startswith(f"| {icons.style} "))
        assert all(part in line for part in ("A. Painter", "CC-BY-4.0", f"{icons.style}.org/licence", "1.0.0"))
    with pytest.raises(ConfigError, match="has 3 other pictures"):
        emoji.write(output, [one for one in read(sets, tmp_path) if one.style == "noto"])


def test_what_is_missing_or_damaged_is_named(sets, tmp_path, monkeypatch):
    folder = tmp_path / "emoji" / "packages"
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match="pip install resvg-py"):
        emoji.draw(read(sets, tmp_path)[0], 24)
    with pytest.raises(DataError, match=r"is not @icons/noto@1\.0\.0: it has sha512-.*Delete it"):
        fetch(replace(sets[0], integrity=sets[1].integrity), folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot start npm, which fetches @icons/noto@2 .*icons-noto-2\.tgz"):
        fetch(replace(sets[0], version="2"), folder)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'E404 no such package' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(ConfigError, match=r"npm could not fetch @icons/noto@2 into .*: E404 no such package"):
        fetch(replace(sets[0], version="2"), folder)
    (folder / sets[0].tarball).write_bytes(b"not a tarball")
    with pytest.raises(DataError, match="is no package of icons"):
        read_package(folder / sets[0].tarball)


def test_the_packages_are_pinned_with_their_licences():
    assert len({icons.style for icons in emoji.ICON_SETS}) == len(emoji.ICON_SETS)
    text = Path("docs/emoji.md").read_text(encoding="utf-8")
    for icons in emoji.ICON_SETS:
        assert len(base64.b64decode(icons.integrity.removeprefix("sha512-"), validate=True)) == 64
        assert f"| {icons.style} | `{icons.package}` | {icons.version} | {icons.licence} |" in text
    assert set(emoji.STYLES) < {icons.style for icons in emoji.ICON_SETS}


def photograph() -> Image.Image:
    rows, columns = np.mgrid[:200, :320]
    return Image.fromarray(np.stack([rows, columns // 2, (rows * columns) % 256], axis=-1).astype(np.uint8))


def test_crops_are_seeded_of_many_scales_and_never_flat_or_enlarged(tmp_path):
    first, again, other = ([*crops.crops(photograph(), "a", 12, seed=seed)] for seed in (0, 0, 1))
    assert [one.tobytes() for one in first] == [one.tobytes() for one in again] != [one.tobytes() for one in other]
    assert {one.size for one in first} == {(64, 64)}
    widths = [np.ptp(np.asarray(one)[..., 0].astype(int)) for one in crops.crops(photograph(), "b", 60)]  # rows shown
    assert min(widths) < 80
    assert max(widths) > 180
    assert min(widths) >= 62
    assert not [*crops.crops(Image.new("RGB", (200, 100), "blue"), "sky", 5)]
    with pytest.raises(ConfigError, match="small is 60x80 pixels, too small for crops of 64"):
        next(crops.crops(Image.new("L", (60, 80)), "small", 1))


def test_crops_of_a_photograph_are_one_group_of_the_split(tmp_path):
    opened = {"summer_1am": photograph, "Garden": photograph}
    assert crops.write(tmp_path / "crops", opened, 11) == 22
    names = {path.name: path.name for path in (tmp_path / "crops").iterdir()}
    config = load_config(PrepConfig, "configs/prep/crops-64.yaml", [f"source={tmp_path / 'crops'}"])
    groups = name_groups(config, names)
    assert {groups[name] for name in names} == {"summer_1am", "Garden"}
    assert groups["Garden-10.png"] == "Garden"
    with pytest.raises(ConfigError, match="has 11 other pictures"):
        crops.write(tmp_path / "crops", {"Garden": photograph}, 11)

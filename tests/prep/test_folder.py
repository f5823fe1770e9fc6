"""A photographer's folder as it is: doctor, plan and run look at it by the same rules and say the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.doctor.places import source_checks
from prep.run import print_plan, run
from prep.verify.verify import verify
from tests.prep.images.test_sources import encoded, picture
from tests.prep.prepared import compute_here
from tests.prep.runs import rejects_of

REFUSED = "refused before anything is computed: 6 of 10 sources (2 duplicate, 2 caption_missing, 1 truncated, 1 empty)"
OTHERS = "4 other files ignored: 2 .xmp, 1 .CR2, 1 .mp4"


@pytest.fixture
def settings(tmp_path: Path) -> PrepConfig:
    folder = tmp_path / "Urlaub 2019"
    for name in ("Küste & Meer", "portraits #2", "phone"):
        (folder / name).mkdir(parents=True)
    names = {
        "Küste & Meer/Foto ä 1.JPG": "JPEG", "Küste & Meer/写真 2.webp": "WEBP", "portraits #2/3.png": "PNG",
        "phone/IMG_4.HEIC": "HEIF", "phone/IMG_5.avif": "AVIF", "phone/6.tif": "TIFF",
    }  # fmt: skip
    for number, (name, kind) in enumerate(names.items()):
        (folder / name).write_bytes(encoded(picture(80, 80, seed=number), kind))
        if number < 4:
            (folder / name).with_suffix(".txt").write_text(f"A picture with the number {number}, of the sea at noon.")
    shutil.copy(folder / "portraits #2" / "3.png", folder / "0.png")  # without a caption, and first by its name
    shutil.copy(folder / "phone" / "IMG_5.avif", folder / "phone" / "IMG_5.jpg")  # under a wrong name
    (folder / "phone" / "cut.jpg").write_bytes(encoded(Image.new("RGB", (80, 80)), "JPEG")[:40])
    (folder / "phone" / "empty.jpg").write_bytes(b"")
    for name in ("Küste & Meer/Foto ä 1.xmp", "3.xmp", "Küste & Meer/Foto ä 1.CR2", "phone/clip.mp4"):
        (folder / name).write_bytes(b"II*\0")
    return PrepConfig(
        source=str(folder), output=str(tmp_path / "out"), base=64, encoders="demo", layers=["text"],
        captions={"on_missing": "reject"},
    )  # fmt: skip


def test_doctor_plan_and_run_say_the_same(
    settings: PrepConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute_here(monkeypatch)
    checks, images = source_checks(settings)
    found = {check.name: check for check in checks}
    assert (images, found["source"].found) == (6, f"6 images in {settings.source}; {OTHERS}")
    assert (found["refused"].status, found["refused"].found) == ("WARN", REFUSED)
    for action in (print_plan, run):
        capsys.readouterr()
        action(settings)
        said = capsys.readouterr().out
        assert OTHERS in said
        assert REFUSED in said
    samples = {row["source"] for row in Dataset(settings.output).rows()}
    assert samples == {
        "Küste & Meer/Foto ä 1.JPG",
        "Küste & Meer/写真 2.webp",
        "portraits #2/3.png",
        "phone/IMG_4.HEIC",
    }
    assert rejects_of(Path(settings.output))["0.png"] == ("source", "duplicate")  # the captioned copy stays
    verify(settings.output)

"""Checks of places: the project's own, and a run's source folder, output, disk and lock."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nanodit import __version__
from nanodit.errors import NanoditError
from nanodit.lock import LOCK
from nanodit.place import PACKAGES, PROJECT, overwritten, shadow
from nanodit.posix import fcntl
from nanodit.storage import LocalFolder, Storage, open_storage
from prep.captions.servers import SERVERS
from prep.captions.sidecar import usual_name
from prep.config import PrepConfig
from prep.doctor.check import DATA, RESOURCE, SETUP, Check, fail, ok, warn
from prep.images.filters import header_problem
from prep.images.sources import BadImage, read_header
from prep.passes.sidecars import has_caption

GB = 1e9
SCAN_SECONDS = 3.0
SAMPLE_BYTES = {"webp": 2.7e6, "jpeg": 2.0e6}  # at base 1024, all layers
DISK_LEAST = 1 * GB
MODEL_CACHE = 8 * GB  # T5-Large and DINOv3 with their download in progress
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NAMED_LATER = "."  # what the command line puts where no config was given
LOOKED_AT = 8  # images whose header is read
NAMED = 3


@dataclass
class FolderImages:
    """The images of a folder as far as their names were reached in ``SCAN_SECONDS``.

    ``uncaptioned`` counts images without a sidecar; ``examples`` and ``wanted`` are the first images and the first
    missing sidecars, as paths below the folder.
    """

    count: int = 0
    complete: bool = True
    uncaptioned: int = 0
    examples: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    problems: list[OSError] = field(default_factory=list)


def count_images(source: Path, captioned: Callable[[str], bool] = lambda name: True) -> FolderImages:
    """Count the images below a folder, and those without a caption.

    ``captioned`` tells of an image whether it has one.
    """
    found, deadline = FolderImages(), time.monotonic() + SCAN_SECONDS
    for parent, folders, files in os.walk(source, onerror=found.problems.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".")]
        for name in sorted(name for name in names if name.lower().endswith(SUFFIXES)):
            path = Path(parent, name).relative_to(source)
            found.count += 1
            found.examples += [str(path)] if len(found.examples) < LOOKED_AT else []
            if time.monotonic() > deadline:  # files are opened to find captions
                break
            if not captioned(path.as_posix()):
                found.uncaptioned += 1
                found.wanted += [usual_name(path.as_posix())] if len(found.wanted) < NAMED else []
        if time.monotonic() > deadline:
            found.complete = False
            break
    return found


def project_check() -> Check:
    """Return whether ``train`` and ``evaluate`` are the project's own too; of ``prep`` the command made sure."""
    if damage := overwritten(*PACKAGES):
        return warn("nanodit", *damage)
    for name in PACKAGES:
        if other := shadow(name):
            found = f"Python finds {other} before {PROJECT / name}"
            return warn("nanodit", found, f"run `nanodit {name}`, not `python -m {name}`")
    return ok("nanodit", f"{__version__} in {PROJECT}")


def place_checks(config: PrepConfig) -> list[Check]:
    """Check source, output, disk and lock; an output in an object store is left to :func:`store_checks`."""
    if config.source == config.output == NAMED_LATER:
        return [
            warn(
                "dataset",
                "no source and no output given: images, disk and lock are not checked",
                "give them: nanodit prep doctor --config FILE, or source=FOLDER output=FOLDER",
            )
        ]
    source, images = source_check(config)
    checks = [source]
    if images.count and "text" in config.active_layers and not config.captions.generated:
        checks.append(caption_check(config, images))
    if images.count:
        checks += size_checks(config, images)
    storage = open_storage(config.output)
    if not isinstance(storage, LocalFolder):
        return checks
    return [*checks, output_check(config), disk_check(config, images.count), lock_check(storage)]


def store_checks(config: PrepConfig) -> list[Check]:
    """Check that this environment's credentials let files be written, where the output is an object store."""
    storage = open_storage(config.output)
    return [] if storage.is_local else [store_check(storage)]


def source_check(config: PrepConfig) -> tuple[Check, FolderImages]:
    """Check that the source can be read, and return its images too (as far as 3 s reach)."""
    source = Path(config.source)
    if not source.is_dir():
        found = f"{source} is not a folder" if source.exists() else f"the folder {source} does not exist"
        return fail("source", SETUP, found, "set source to the folder with the images"), FolderImages()
    asks = "text" in config.active_layers and not config.captions.generated
    images = count_images(source, partial(has_caption, config) if asks else lambda name: True)
    count, problems = images.count, images.problems
    if not count:
        reason = f"{problems[0].filename}: {problems[0].strerror}" if problems else f"no image in {source}"
        return fail("source", DATA, reason, "set source to a folder with images that this user may read"), images
    example = source / images.examples[0]
    try:
        with open(example, "rb") as file:
            file.read(1)
    except OSError as error:
        found = f"{example}: {error.strerror}"
        return fail("source", DATA, found, "let this user read the images (chmod, chown)"), images
    if problems:
        found = f"{count} images in {source}, but {problems[0].filename} cannot be read ({problems[0].strerror})"
        return warn("source", found, "let this user read all of it, or expect those images to be missing"), images
    return ok("source", f"{'' if images.complete else 'more than '}{count} images in {source}"), images


def caption_check(config: PrepConfig, images: FolderImages) -> Check:
    """Check that every image that was counted has a sidecar; what the sidecars hold is for the plan to read."""
    if not images.uncaptioned:
        return ok("captions", "each image has one; no server needed")
    more = ", ..." if images.uncaptioned > len(images.wanted) else ""
    found = f"{images.uncaptioned} of {images.count} images have no caption: {', '.join(images.wanted)}{more} missing"
    write = f"write NAME.txt beside each image, or let a model write them (captions.backend={' or '.join(SERVERS)})"
    if config.captions.on_missing == "error":
        fix = f"{write}, or set captions.on_missing=reject to leave these images out"
        return fail("captions", DATA, found, fix)
    if images.uncaptioned > config.max_reject_rate * images.count:
        found += f", more than max_reject_rate {config.max_reject_rate:g} allows a run to leave out"
        return fail("captions", DATA, found, write)
    return warn("captions", f"{found}; they are left out", "write NAME.txt beside each image that you want to keep")


def size_checks(config: PrepConfig, images: FolderImages) -> list[Check]:
    """Warn when some of the first images would be refused for their size; nothing else about them is checked."""
    refused = []
    for name in images.examples:
        try:
            header = read_header(Path(config.source), name, config.image.max_pixels)
        except BadImage:  # counted by the run, with its reason
            continue
        if problem := header_problem(
            header.width, header.height, config.filters, config.base, config.image.max_upscale
        ):
            refused.append(f"{name} ({problem[1]})")
    if not refused:
        return []
    found = f"{len(refused)} of {len(images.examples)} images examined would be refused: {refused[0]}"
    return [
        warn(
            "images",
            found,
            f"use larger images, or a base below {config.base}; `nanodit prep plan` counts all of them",
        )
    ]


def output_check(config: PrepConfig) -> Check:
    """Check that files can be written where the dataset goes, and leave nothing behind."""
    source, output = Path(config.source).resolve(), Path(config.output).resolve()
    if output.is_relative_to(source) or source.is_relative_to(output):
        found = f"source {config.source} and output {config.output} lie inside each other"
        return fail("output", SETUP, found, "choose another output")
    folder = _existing(output)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(20, "is not a folder", str(folder))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return fail("output", RESOURCE, f"{folder}: {error.strerror}", "choose an output that this user may write")
    exists = (output / "dataset.json").exists()
    return ok(
        "output", f"{config.output} {'is a dataset that a run brings up to date' if exists else 'can be written'}"
    )


def store_check(storage: Storage) -> Check:
    """Check that an object store can be listed, written and cleaned with the credentials of this environment."""
    name = f"runs/.doctor-{os.getpid()}"
    try:
        storage.write(name, b"written by prep doctor")
        storage.delete(name)
    except (NanoditError, OSError) as error:
        text = " ".join(str(error).split())
        found, _, fix = text.partition(". ")
        return fail("output", RESOURCE, found, fix or "check the network and the credentials in the environment")
    return ok("output", f"{storage} can be written")


def disk_check(config: PrepConfig, images: int) -> Check:
    """Compare the free space at the output with what ``images`` images take."""
    folder = _existing(Path(config.output).resolve())
    free = shutil.disk_usage(folder).free
    need = images * SAMPLE_BYTES[config.image.format] * (config.base / 1024) ** 2
    found = f"{free / GB:.1f} GB free at {folder}"
    if free < DISK_LEAST:
        return fail("disk", RESOURCE, found, "make room, or choose an output on another disk")
    if free < need:
        found += f"; {images} images take about {need / GB:.1f} GB"
        return warn(
            "disk",
            found,
            "make room, choose another disk, or set image.format=jpeg; `nanodit prep plan` has the sizes",
        )
    return ok("disk", found + (f"; {images} images take about {max(need / GB, 0.1):.1f} GB" if images else ""))


def cache_check() -> Check:
    """Check the room for downloaded models."""
    from huggingface_hub import constants

    folder = _existing(Path(constants.HF_HUB_CACHE))
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.1f} GB free at {folder}"
    if free >= MODEL_CACHE:
        return ok("model_cache", found)
    return warn("model_cache", f"{found}, and the models take 4 GB", "make room, or set HF_HOME to a larger disk")


def lock_check(storage: LocalFolder) -> Check:
    """Check that no other run holds the dataset. The lock is tried for an instant, and nothing is written."""
    try:
        file = open(storage.root / LOCK, encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError:
        return ok("lock", "no run is at work on this dataset")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            owner = file.read().strip() or "unknown"
            return warn("lock", f"another prep run is writing this dataset ({owner})", "wait for it to end, or stop it")
    return ok("lock", "no run is at work on this dataset")


def _existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path

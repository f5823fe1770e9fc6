"""Checks of places: the project's own, and a run's source folder, output, disk and lock."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nanodit import __version__
from nanodit.console import without_progress
from nanodit.errors import DataError, NanoditError, ResourceError
from nanodit.lock import LOCK
from nanodit.place import PACKAGES, PROJECT, overwritten, shadow
from nanodit.posix import fcntl
from nanodit.storage import LocalFolder, Storage, open_storage
from prep.config import PrepConfig
from prep.dataset.layout import Unit
from prep.doctor.check import DATA, RESOURCE, SETUP, Check, fail, ok, warn
from prep.images.scan import Read, Reject, read_all, scan
from prep.images.scan_cache import ScanCache
from prep.images.sources import Source
from prep.passes.fitting import judge_sizes
from prep.passes.missing_sources import committed_caption_hashes, unusual_names
from prep.passes.plan import count_rejects, read_manifest, read_parts, scan_settings
from prep.passes.publish import gate
from prep.passes.sidecars import has_caption, read_captions

GB = 1e9
SCAN_SECONDS = 3.0
SAMPLE_BYTES = {"webp": 2.7e6, "jpeg": 2.0e6}  # at base 1024, all layers
DISK_LEAST = 1 * GB
MODEL_CACHE = 8 * GB  # T5-Large and DINOv3 with their download in progress
NAMED_LATER = "."  # what the command line puts where no config was given
AT_A_TIME = 64  # images that are read between two looks at the clock
NAMED = 3


@dataclass(frozen=True)
class Folder:
    """What a run would find in a source folder, as far as it was looked at in ``SCAN_SECONDS``.

    ``usable`` has the images that would be prepared, ``refused`` what would not, before any caption is read; ``seen``
    counts both, and ``left`` the files that were not looked at.
    """

    usable: dict[str, Source]
    refused: list[Reject]
    others: str
    seen: int
    left: int


def look_at_folder(config: PrepConfig) -> Folder:
    """Scan a source by the rules of a run, with what an earlier run remembers of it. Nothing is written."""
    source, storage = Path(config.source), open_storage(config.output)
    deadline, seen, total = time.monotonic() + SCAN_SECONDS, 0, 0

    def look_all(names: Sequence[str], read: Read) -> Iterator[dict[str, Any] | Exception | None]:
        nonlocal seen, total
        total = len(names)
        known = ScanCache(storage, source, scan_settings(config)).look_all if storage.is_local else read_all
        for start in range(0, len(names), AT_A_TIME):
            if start and time.monotonic() > deadline:
                return
            for found in known(names[start : start + AT_A_TIME], read):
                seen += 1
                yield found

    names = unusual_names(read_manifest(storage)) if storage.is_local else ()
    found = scan(source, config.image.max_pixels, look_all, partial(has_caption, config), names)
    fitting = judge_sizes(config, found.sources)
    refused = found.rejects + fitting.rejects
    return Folder(fitting.sources, refused, found.others, len(found.sources) + len(found.rejects), total - seen)


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
    with without_progress():
        checks, images = source_checks(config)
    storage = open_storage(config.output)
    if not isinstance(storage, LocalFolder):
        return checks
    return [*checks, output_check(config), disk_check(config, images), lock_check(storage)]


def store_checks(config: PrepConfig) -> list[Check]:
    """Check that this environment's credentials let files be written, where the output is an object store."""
    storage = open_storage(config.output)
    return [] if storage.is_local else [store_check(storage)]


def source_checks(config: PrepConfig) -> tuple[list[Check], int]:
    """Check what a run would find in the source, and whether it would begin; also returns the number of its images."""
    source = Path(config.source)
    if not source.is_dir():
        found = f"{source} is not a folder" if source.exists() else f"the folder {source} does not exist"
        return [fail("source", SETUP, found, "set source to the folder with the images")], 0
    try:
        folder = look_at_folder(config)
    except (ResourceError, DataError) as error:  # also of a damaged manifest of the output
        return [failure("source", error)], 0
    others = f"; {folder.others}" if folder.others else ""
    if not folder.seen:
        found = f"no image in {source}{others}"
        return [fail("source", DATA, found, "set source to a folder with images that this user may read")], 0
    count = len(folder.usable)
    more = f", as far as 3 s reach; {folder.left} more files to look at" if folder.left else ""
    found = f"{count} {'image' if count == 1 else 'images'} in {source}{more}{others}"
    checks, missing = [ok("source", found)], []
    if "text" in config.active_layers and not config.captions.generated and folder.usable:
        try:
            _, missing, notes = read_captions(config, folder.usable, partial(committed_captions, config))
        except DataError as error:
            checks.append(failure("captions", error))
        else:
            fix = "check the disk, the network and the permissions"
            checks += [warn("captions", note.removeprefix("warning: "), fix) for note in notes]
            checks += [caption_check(missing, count)] if missing or not notes else []
    refused = folder.refused + missing
    if refused:
        (line,) = count_rejects(refused, folder.seen)
        examples = "; ".join(f"{reject.source}: {reject.detail}" for reject in refused[:NAMED])
        fix = f"`nanodit prep run` lists all of them in rejects.parquet; for example {examples}"
        checks.append(warn("refused", line, fix))
        try:
            gate(config, refused, folder.seen, report=None)
        except DataError as error:
            checks[-1] = failure("refused", error)
    return checks, count + folder.left


def committed_captions(config: PrepConfig, keys: set[str]) -> dict[str, str]:
    """Return the fingerprints of the captions of some keys that a local dataset has; a run keeps them."""
    storage = open_storage(config.output)
    if not storage.is_local:
        return {}
    manifest = read_manifest(storage)
    rows = manifest.filter(pc.is_in(manifest["key"], value_set=pa.array(sorted(keys)))).to_pylist()
    return committed_caption_hashes(read_parts(storage, {Unit(row["bucket"], row["shard"], "text") for row in rows}))


def failure(name: str, error: NanoditError) -> Check:
    """Return the check of what would end a run at its start."""
    found, _, fix = str(error).partition(". ")
    return fail(name, error.exit_code, found, fix or "repair the sources")


def caption_check(missing: Sequence[Reject], images: int) -> Check:
    """Return what the captions of the images that were looked at are like, where a run goes on without some."""
    if not missing:
        return ok("captions", "each image has one; no server needed")
    found = f"{len(missing)} of {images} images have no usable caption, and are left out: {missing[0].detail}"
    return warn("captions", found, "write NAME.txt beside each image that you want to keep")


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

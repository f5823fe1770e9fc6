"""``prep captions``: reading the captions of a dataset, finding doubtful ones, and writing them to files to be mended.

A file that was written from the dataset and changed by a person is that person's caption: the next run takes it, and
keeps it when another model writes the others (``captions.keep_edited``). One that nobody changed stays the model's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_bytes, write_atomic
from nanodit.lock import locked
from nanodit.storage import Storage
from prep.captions.quality import Answer, CaptionRules, find_flaw, normalised
from prep.captions.sentences import first_sentence
from prep.captions.sidecar import usual_name
from prep.captions.written import read_written, record_written
from prep.dataset.layout import Unit, read_part
from prep.dataset.reader import Dataset
from prep.images.sources import leads_out

ANY_LENGTH = CaptionRules(1, 1 << 30, {}, 0.0)
SHOWN = 100  # letters of a caption that is listed
TAG_WORDS, TAG_COUNT = 3, 6  # a caption of so many commas and so few words between them is a list of tags
EDGE = 0.1  # share of the limits near which a generated caption is worth a look


@dataclass(frozen=True)
class Captioned:
    """A published caption: the short one, whether a model wrote it, and the reasons to doubt it."""

    key: str
    source: str
    text: str
    short: str | None
    generated: bool
    doubts: tuple[str, ...]


def list_captions(dataset: str, flagged: bool = False) -> None:
    """Print the captions of a dataset, one a line, with what is doubtful about them; ``flagged``: those alone."""
    opened = _open(dataset)
    captions = list(read_captioned(opened))
    shown = [caption for caption in captions if caption.doubts or not flagged]
    for caption in shown:
        text = caption.text if len(caption.text) <= SHOWN else f"{caption.text[: SHOWN - 3]}..."
        if caption.short is not None and caption.short != caption.text:
            text = f"{text}  (short: {caption.short})"
        doubts = f"  [{'; '.join(caption.doubts)}]" if caption.doubts else ""
        say(f"{caption.key[:12]}  {caption.source}{doubts}  {text}")
    doubtful = [caption for caption in captions if caption.doubts]
    counts = Counter(doubt.partition(":")[0] for caption in doubtful for doubt in caption.doubts)
    kinds = f" ({', '.join(f'{count} {kind}' for kind, count in counts.most_common())})" if counts else ""
    written = sum(caption.generated for caption in captions)
    say(f"{len(captions)} captions, {written} by a model; {len(doubtful)} doubtful{kinds}")


def write_captions(dataset: str, folder: Path, beside: bool) -> None:
    """Write each generated caption to ``NAME.txt`` below ``folder``, which mirrors the source.

    ``beside``: the folder is the source itself, where no file is written whose image is not there. A file that is there
    and was not written by this command, or was changed since, stays. Images that would share a file get none. Raises
    ConfigError for a folder that is not there.
    """
    if beside and not folder.is_dir():
        raise ConfigError(f"--source {folder} is not a folder. Name the folder with the images, or --to FOLDER")
    opened = _open(dataset)
    storage = opened.storage
    counts: Counter[str] = Counter()
    with locked(storage):
        written = read_written(storage) if beside else {}
        files = Counter(map(usual_name, opened.table["source"].to_pylist()))
        generated = [caption for caption in read_captioned(opened) if caption.generated]
        captions = [caption for caption in generated if files[usual_name(caption.source)] == 1]
        shared = [caption.source for caption in generated if files[usual_name(caption.source)] > 1]
        with Progress("write", len(captions), "captions") as progress:
            for caption in captions:
                counts[_write(caption, folder, beside, written)] += 1
                progress.advance()
        if beside:
            record_written(storage, written)
    say(f"wrote {counts['written']} captions below {folder}, {counts['equal']} were there already")
    if kept := counts["kept"]:
        say(f"{kept} {'file stays as a person wrote it' if kept == 1 else 'files stay as a person wrote them'}")
    if shared:  # the next run would take the caption of one for both
        images = f"{len(shared)} image{'' if len(shared) == 1 else 's'}"
        say(f"{images} would share a file with another, such as {min(shared)}; nothing was written")
    if gone := counts["gone"]:
        say(f"{gone} images are not in {folder} any more; nothing was written for them")


def _write(caption: Captioned, folder: Path, beside: bool, written: dict[str, str]) -> str:
    data = f"{caption.text}\n".encode()
    digest, path = sha256_bytes(data), folder / usual_name(caption.source)
    if beside and not (folder / caption.source).is_file():
        return "gone"
    if leads_out(path.parent, folder):
        raise ConfigError(f"{path.parent} leads out of {folder}. Remove that link, or choose another folder")
    if os.path.lexists(path):
        before = sha256_bytes(path.read_bytes()) if path.is_file() and not path.is_symlink() else ""
        if before != digest and (not before or before != written.get(caption.key)):
            return "kept"
        if before == digest:
            written[caption.key] = digest
            return "equal"
    write_atomic(path, data)
    written[caption.key] = digest
    return "written"


def read_captioned(dataset: Dataset) -> Iterator[Captioned]:
    """Yield the captions in the order of the keys."""
    came = _came_with_images(dataset.storage, dataset)
    limits = dataset.info["stages"]["source"]["captions"]
    names = [
        name
        for name in ("key", "source", "caption", "caption_short", "t5_truncated")
        if name in dataset.table.column_names
    ]
    table = dataset.table.select(names)
    seen = Counter(map(normalised, table["caption"].to_pylist()))
    for start in range(0, len(table), 1 << 14):
        for row in table.slice(start, 1 << 14).to_pylist():
            generated = row["key"] not in came
            doubts = tuple(_doubts(row["caption"], generated, limits["min_words"], limits["max_words"]))
            if seen[normalised(row["caption"])] > 1:
                doubts += ("the same as another's",)
            if row.get("t5_truncated"):
                doubts += ("cut by t5.max_tokens",)
            short = row.get("caption_short")
            if generated and short == first_sentence(row["caption"]):
                doubts += ("short caption: the first sentence, for want of another",)
            yield Captioned(row["key"], row["source"], row["caption"], short, generated, doubts)


def _doubts(text: str, generated: bool, least: int, most: int) -> Iterator[str]:
    if flaw := find_flaw(Answer(text, "stop", {}), ANY_LENGTH):
        yield flaw.detail
    parts = [part.split() for part in text.split(",")]
    if len(parts) >= TAG_COUNT and max(map(len, parts)) <= TAG_WORDS:
        yield "a list of tags"
    count = len(text.split())
    if generated and not least * (1 + EDGE) <= count <= most * (1 - EDGE):
        yield f"of unusual length: {count} words"


def _came_with_images(storage: Storage, dataset: Dataset) -> set[str]:
    """Return the keys whose caption came with the image, as the recipes of the units say."""
    keys: set[str] = set()
    for shard in dataset.table.group_by(["bucket", "shard"]).aggregate([]).to_pylist():
        part = read_part(storage, Unit(shard["bucket"], shard["shard"], "text"), ["key"])
        keys |= (part.recipe.get("captions") or {}).keys() if part else set()
    return keys


def _open(dataset: str) -> Dataset:
    opened = Dataset(dataset)
    if "text" not in opened.layers:
        raise DataError(f"{dataset} has no captions (its layers are {', '.join(opened.layers)})")
    return opened

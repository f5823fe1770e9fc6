"""Captions of many images in one file: metadata.jsonl and metadata.csv of Hugging Face's ImageFolder, kohya's JSON.

Formats: https://huggingface.co/docs/datasets/image_load#imagefolder, https://github.com/kohya-ss/sd-scripts (what
``finetune/merge_captions_to_metadata.py`` writes: the key of an image -> its ``caption`` and ``tags``).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from prep.images.sources import leads_out

METADATA = ("metadata.jsonl", "metadata.csv")
KOHYA = (
    "meta_lat.json",
    "meta_clean.json",
    "meta_cap_dd.json",
    "meta_cap.json",
    "metadata.json",
)  # the last step first
TEXT_COLUMNS = ("text", "caption")
NAME_COLUMNS = ("file_name", "image_path")  # the second one is sd-scripts' in its own JSONL
MAX_TABLE_BYTES = 1 << 30
MAX_TEXT = 1 << 20  # letters of a line or a field
OUTSIDE = "the link leads out of the source folder"


class BadTable(Exception):
    """A file that cannot be read as a table of captions; the message says why."""


def table_caption(folder: Path, source: str, kind: str) -> tuple[str, str] | None:
    """Return the caption of a source and the table that has it, below the folder; None where no table names it.

    ``kind`` is "metadata" or "json". The nearest table counts: that of the source's own folder, then those of the
    folders above it up to ``folder``. Raises BadTable where one that would count cannot be read.
    """
    files, keys = (METADATA, _row_keys) if kind == "metadata" else (KOHYA, _kohya_keys)
    parent = PurePosixPath(source).parent
    for place in (parent, *parent.parents):
        for name in files:
            path = folder / place / name
            try:
                stat = os.stat(path)
            except OSError:
                continue
            try:
                linked = leads_out(path, folder)
                rows = OUTSIDE if linked else _rows_or_problem(str(path), stat.st_size, stat.st_mtime_ns)
            except OSError as error:
                raise BadTable(f"{place / name} cannot be read as a table of captions: {error}") from error
            if isinstance(rows, str):
                raise BadTable(f"{place / name} cannot be read as a table of captions: {rows}")
            for key in keys(folder, source, place):
                if key in rows:
                    return rows[key], str(place / name)
    return None


def object_caption(value: Any) -> str:
    """Return the caption of a JSON object, as sd-scripts trains with it: ``caption`` (or ``text``), then ``tags``."""
    if not isinstance(value, dict):
        return ""
    caption = next((value[name] for name in ("caption", "text") if isinstance(value.get(name), str)), "")
    tags = value.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    return ", ".join(part for part in (caption, tags) if isinstance(part, str) and part.strip())


def _row_keys(folder: Path, source: str, place: PurePosixPath) -> Iterator[str]:
    yield str(PurePosixPath(source).relative_to(place))


def _kohya_keys(folder: Path, source: str, place: PurePosixPath) -> Iterator[str]:
    name = PurePosixPath(source)
    below = name.relative_to(place)
    yield from (str(folder / name), str((folder / name).resolve()), str(below), str(below.with_suffix("")))
    if name.parent == place:  # keys without a folder are of the folder that the file lies in
        yield name.stem


@lru_cache(maxsize=4)
def _rows_or_problem(path: str, size: int, _: int) -> dict[str, str] | str:
    """Return the captions of a table by the names in it, or what is wrong: each of its images asks for them."""
    try:
        return _read(path, size)
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        return str(error)


def _read(path: str, size: int) -> dict[str, str]:
    """Return the captions of a table; of a name that comes twice the last."""
    if size > MAX_TABLE_BYTES:
        raise ValueError(f"larger than {MAX_TABLE_BYTES} bytes")
    if not os.path.isfile(path):
        raise ValueError("not a regular file")
    rows: dict[str, str] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.endswith(".json"):
            content = json.load(file)
            entries = content.items() if isinstance(content, dict) else ()
            return {key: text for key, value in entries if (text := object_caption(value))}
        for row in _lines(file) if path.endswith(".jsonl") else _fields(file):
            name = next((row[column] for column in NAME_COLUMNS if isinstance(row.get(column), str)), None)
            text = next((row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str)), "")
            if name and text.strip():
                rows[name.removeprefix("./")] = text
    return rows


def _lines(file: Any) -> Iterator[dict[str, Any]]:
    number = 0
    while line := file.readline(MAX_TEXT + 1):
        number += 1
        if len(line) > MAX_TEXT:
            raise ValueError(f"line {number} has more than {MAX_TEXT} letters")
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield row


def _fields(file: Any) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_TEXT)
    reader = csv.DictReader(file, strict=True)
    if not set(NAME_COLUMNS) & set(reader.fieldnames or ()):
        raise ValueError("it has no column file_name")
    yield from reader

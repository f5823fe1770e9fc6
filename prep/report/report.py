"""``prep report``: one offline HTML page that shows what a dataset holds, what was refused, and what it took.

The template ``report.html`` gets plain values from :mod:`prep.report.views` and :mod:`prep.report.facts`. jinja2
escapes every string, and the page's Content-Security-Policy forbids it to load or run anything. Equal datasets give
equal bytes; times come from the logs of the runs alone, in a section of their own.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from nanodit.console import Progress
from nanodit.errors import DataError
from nanodit.files import sha256_bytes, write_atomic
from nanodit.pages import open_template
from nanodit.storage import Storage, open_storage
from prep.dataset import versions
from prep.dataset.holdout import PARTS
from prep.dataset.layers import LAYERS
from prep.dataset.layout import read_parquet
from prep.dataset.reader import Dataset
from prep.passes.advice import advise
from prep.passes.publish import REJECTS
from prep.report import facts, views
from prep.report.decisions import decisions
from prep.report.pictures import RejectThumbnails, SampleThumbnails

REPORT = "report.html"


def write_report(dataset: Path | str | Storage, output: Path | None = None, source: Path | None = None) -> Path | str:
    """Write the page about a dataset (a folder, or the URL of an object store), by default ``report.html`` in it.

    Sources that were refused are shown from the folder ``source``, if it is given. Return the page's path or URL.
    Raises DataError for something that is no dataset, holds no sample, or is damaged.
    """
    storage = open_storage(dataset)
    page = render(storage, source)
    if output is None:
        storage.write(REPORT, page)
        return Path(storage.where(REPORT)) if storage.is_local else storage.where(REPORT)
    write_atomic(output, page)
    return output


def render(storage: Storage, source: Path | None = None) -> str:
    """Return the page as text; ``source`` as of :func:`write_report`."""
    dataset = Dataset(storage)
    if not len(dataset):
        raise DataError(f"{storage}: the index holds no sample, so there is nothing to show")
    info, table, rejects = dataset.info, dataset.table, read_rejects(dataset)
    thumbnails = SampleThumbnails(dataset)
    sections = {
        "first": lambda: views.first(dataset, thumbnails),
        "buckets": lambda: views.buckets(dataset, thumbnails),
        "crops": lambda: views.crops(table),
        "sharpness": lambda: views.sharpness(dataset, thumbnails),
        "captions": lambda: views.captions(dataset, thumbnails),
        "poses": lambda: views.poses(dataset, thumbnails),
        "duplicates": lambda: views.duplicates(dataset, thumbnails, rejects),
        "rejects": lambda: views.refused(rejects, RejectThumbnails(dataset, source)),
        "bytes": lambda: facts.layer_bytes(dataset),
        "models": lambda: facts.models(info),
        "timings": lambda: facts.timings(facts.read_runs(storage)),
    }
    shown = {}
    with Progress("report", len(sections), "sections") as progress:
        for name, make in sections.items():
            shown[name] = make()
            progress.advance()
    filters = {"size": size, "percent": percent, "count": lambda number: f"{number:,}", "moment": moment}
    return open_template(Path(__file__).with_name(REPORT), filters).render(
        **shown,
        decisions=decisions(advise(table, info["buckets"]), shown["rejects"], shown["captions"], shown["duplicates"]),
        info=info,
        parts={part: len(dataset.rows(part)) for part in PARTS} if dataset.rows("holdout") else None,
        fingerprint=dataset.fingerprint,
        absent=[layer for layer in LAYERS if layer not in dataset.layers],
        sheet=views.SHEET,
        rejects_known=rejects is not None,
        source_known=source is not None,
        stages=json.dumps(info.get("stages", {}), indent=2, ensure_ascii=False, sort_keys=True),
    )


def read_rejects(dataset: Dataset) -> pa.Table | None:
    """Return the refused sources of a version; None where the table is missing. Raises DataError when it is damaged."""
    storage, sha256 = dataset.storage, dataset.info["hashes"].get(REJECTS)
    # what is kept goes first: a run that publishes writes its own table before dataset.json
    kept = storage.read_if_there(versions.kept_table(sha256)) if versions.is_hash(sha256) else None
    try:
        return read_parquet(kept if kept and sha256_bytes(kept) == sha256 else storage.read(REJECTS))
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{storage.where(REJECTS)} is damaged ({error}). Run nanodit prep run again to restore it"
        ) from error


def size(count: float) -> str:
    """Return bytes as people read them, with three significant digits: ``1.03 MB``."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    unit = units[0]
    return f"{count:.0f}\u00a0{unit}" if unit == "bytes" or count >= 100 else f"{count:#.3g}\u00a0{unit}"


def percent(share: float) -> str:
    """Return a share as people read it, ``4.2 %``; only nothing is 0 and only all is 100."""
    if share in (0, 1) or 0.1 <= share < 0.99:
        return f"{100 * share:.0f}\u00a0%"
    if share < 0.001:
        return "< 0.1\u00a0%"
    return "> 99.9\u00a0%" if share > 0.999 else f"{100 * share:.1f}\u00a0%"


def moment(seconds: float | None) -> str:
    """Return a Unix time as UTC, to the minute."""
    return "unknown" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")

"""Captions that came with the images: what a plan says of them, and what the text layer takes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanodit.console import Progress, say
from nanodit.errors import DataError
from prep.captions.servers import SERVERS
from prep.captions.sidecar import (
    MISSING,
    SOURCE_GONE,
    UNREADABLE,
    BadCaption,
    Caption,
    SidecarCaptions,
    gone_without_caption,
    kept_caption,
    look_all_captions,
)
from prep.config import PrepConfig
from prep.dataset.layout import Part
from prep.images.scan import LookAll, Reject, read_all
from prep.images.sources import Source

if TYPE_CHECKING:
    from prep.passes.layers import ShardTask

BLOCK = 10_000  # sidecars that are looked at at a time
NAMED = 5  # how many examples an error lists


def read_captions(
    config: PrepConfig,
    sources: Mapping[str, Source],
    committed: Callable[[set[str]], Mapping[str, str]],
    look_all: LookAll = read_all,
    written: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], list[Reject], list[str]]:
    """Return what every sample's text depends on: its caption's fingerprint, or the reason for having none.

    Where a model writes the captions that are missing, samples without a usable one are left out; where it writes all
    of them, every sample is. ``committed`` gives the fingerprints of captions of some keys that were used before: gone
    sources keep theirs, and so do those whose caption cannot be read now. Also returns what is going to be refused for
    a bad caption, and lines for the user. ``written`` has what ``prep captions`` wrote
    (:mod:`prep.captions.written`): where a model writes captions, a file that is as it was written there is no caption
    of a person's. Raises DataError with the count and the first paths when ``captions.on_missing`` is "error" and a
    caption cannot be used, before anything expensive runs.
    """
    written = written if config.captions.generated and written else {}
    if "text" not in config.layers or (config.captions.overwrite and not (config.captions.keep_edited and written)):
        return {}, [], []
    origins = config.captions.origins
    if config.captions.overwrite:  # what was written are NAME.txt alone
        origins = tuple(origin for origin in origins if origin == "txt")
        sources = {key: source for key, source in sources.items() if key in written}
    captions: dict[str, str] = {}
    problems: list[tuple[Source, BadCaption]] = []
    gone = {key for key, source in sources.items() if source.gone}
    before = committed(gone) if gone else {}
    listed = list(sources)
    with Progress("captions", len(sources), "captions") as progress:
        for start in range(0, len(listed), BLOCK):
            block = [sources[key] for key in listed[start : start + BLOCK]]
            asked = [source for source in block if not (source.gone and source.key in before)]
            looked = look_all_captions(SidecarCaptions(Path(config.source), origins), asked, look_all)
            found = {source.key: caption for source, caption in zip(asked, looked)}
            for source in block:
                caption = found.get(source.key, before.get(source.key, ""))
                if source.gone and isinstance(caption, BadCaption):  # nobody can be asked to write it
                    caption = gone_without_caption(source.name)
                if isinstance(caption, BadCaption):
                    problems.append((source, caption))
                    caption = "" if config.captions.generated else caption.reason
                if caption and caption != written.get(source.key):
                    captions[source.key] = caption
            progress.advance(len(block))
    unread = {source.key for source, problem in problems if problem.reason == UNREADABLE}
    again = {key: hash_ for key, hash_ in (committed(unread) if unread else {}).items() if key in unread}
    captions |= again
    problems = [(source, problem) for source, problem in problems if source.key not in again]
    notes = [f"warning: {len(again)} captions cannot be read now: those made before stay"] if again else []
    if config.captions.generated:
        say_unusable([problem for _, problem in problems if problem.reason not in (SOURCE_GONE, MISSING)])
        return captions, [], notes
    bad = [problem for _, problem in problems if problem.reason != SOURCE_GONE]
    if bad and config.captions.on_missing == "error":
        raise DataError(
            f"{len(bad)} of {len(sources)} images have no usable caption {counted(bad)}. Write NAME.txt beside each "
            f"image, let a model write them (captions.backend={' or '.join(SERVERS)}), or set captions.on_missing="
            "reject to leave these images out"
        )
    expected = [Reject(source.name, "text", problem.reason, problem.detail) for source, problem in problems]
    return captions, expected, notes


def counted(problems: Sequence[BadCaption]) -> str:
    """Return how many problems there are of each kind, and the first ones."""
    counts = Counter(problem.reason for problem in problems).most_common()
    examples = "; ".join(problem.detail for problem in problems[:NAMED])
    more = "; ..." if len(problems) > NAMED else ""
    return f"({', '.join(f'{count} {name}' for name, count in counts)}): {examples}{more}"


def say_unusable(problems: Sequence[BadCaption]) -> None:
    """Tell the user of captions that came with images and are written anew."""
    if problems:
        found = f"{len(problems)} {counted(problems)}"
        say(f"captions that came with images and cannot be used: {found}. A model writes them")


def text_recipe(keys: Sequence[str], captions: Mapping[str, str], generated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the captions of a shard are made from: those that came with its images, and a model's for the others.

    ``captions`` is what :func:`read_captions` returns, ``generated`` the recipe of the model, empty for none.
    """
    kept = {key: captions[key] for key in keys if key in captions}
    if len(kept) == len(keys):
        return {"backend": "sidecar", "captions": kept}
    return {**generated, "captions": kept} if kept else dict(generated)


def came_with_images(
    config: PrepConfig, task: ShardTask, before: Part | None, keys: Iterable[str]
) -> Iterator[tuple[str, Caption | BadCaption]]:
    """Yield the captions that the recipe of a shard takes from its images, of some keys, or why there is none.

    ``before`` is the committed text unit: it has the captions of images that are gone.
    """
    captions, known = sidecars_of(config), captions_by_fingerprint(before)
    sources = {source.key: source for source in task.sources}
    planned = task.recipes["text"].get("captions", {})
    found: dict[str, Caption | BadCaption] = {}
    listed = [key for key in keys if key in planned]
    for key in sorted(listed, key=lambda key: sources[key].name):  # those of a folder together, which may have a table
        source, wanted = sources[key], planned[key]
        try:
            if source.gone and wanted in known:
                caption = known[wanted]
            elif wanted == SOURCE_GONE:
                raise gone_without_caption(source.name)
            else:
                caption = read_or_keep(captions, source.name, known.get(wanted))
            if caption.fingerprint != wanted:
                raise BadCaption("changed_during_run", "the caption changed after the run had begun")
            found[key] = caption
        except BadCaption as bad:
            found[key] = bad if bad.reason == wanted else BadCaption("changed_during_run", bad.detail)
    for key in listed:
        yield key, found[key]


def read_or_keep(captions: SidecarCaptions, source: str, before: Caption | None) -> Caption:
    """Return the caption of a source, or the one of ``before`` where it cannot be read just now."""
    try:
        return captions.caption(source)
    except BadCaption as bad:
        if before is None or bad.reason != UNREADABLE:
            raise
        return before


def captions_by_fingerprint(part: Part | None) -> dict[str, Caption]:
    """Return the captions of a committed unit that came with images, by their fingerprints; they outlive it."""
    if part is None:
        return {}
    known = part.recipe.get("captions", {})
    return {
        known[key]: kept_caption(text, known[key])
        for key, text in zip(part.table["key"].to_pylist(), part.table["caption"].to_pylist())
        if key in known
    }


def sidecars_of(config: PrepConfig) -> SidecarCaptions:
    """Return what reads the captions that came with the images."""
    return SidecarCaptions(Path(config.source), config.captions.origins)


def has_caption(config: PrepConfig, source: str) -> bool:
    """Tell whether a source has a caption that can be used; False where the dataset has none."""
    try:
        return "text" in config.layers and not config.captions.overwrite and bool(sidecars_of(config).caption(source))
    except BadCaption:
        return False

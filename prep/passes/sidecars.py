"""What every sample's caption is made from, where captions lie beside the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanodit.console import Progress
from nanodit.errors import DataError
from prep.captions.sidecar import SOURCE_GONE, BadCaption, SidecarCaptions, gone_without_caption, usual_name
from prep.config import PrepConfig
from prep.images.sources import LookAll, Reject, Source, read_all

BLOCK = 10_000  # sidecars that are looked at at a time
NAMED = 5  # how many examples an error lists


def read_captions(
    config: PrepConfig,
    sources: Mapping[str, Source],
    committed: Mapping[str, str],
    look_all: LookAll = read_all,
) -> tuple[dict[str, str], list[Reject]]:
    """Return what every sample's text depends on: its sidecar's hash or the reason for having none; empty without text.

    ``committed`` has the hashes of captions that were used before: gone sources keep theirs. Also returns what is going
    to be refused for a bad caption. Raises DataError with the count and the first paths when ``captions.on_missing`` is
    "error" and a caption cannot be used, before anything expensive runs.
    """
    if "text" not in config.layers or config.captions.generated:
        return {}, []
    captions: dict[str, str] = {}
    problems: list[tuple[str, BadCaption]] = []
    listed = list(sources)
    with Progress("captions", len(sources), "captions") as progress:
        for start in range(0, len(listed), BLOCK):
            block = [sources[key] for key in listed[start : start + BLOCK]]
            asked = [source.name for source in block if not (source.gone and source.key in committed)]
            found = dict(zip(asked, look_at_captions(config, asked, look_all)))
            for source in block:
                caption = found.get(source.name, committed.get(source.key, ""))
                if source.gone and isinstance(caption, BadCaption):  # nobody can be asked to write it
                    caption = gone_without_caption(source.name)
                if isinstance(caption, BadCaption):
                    problems.append((source.name, caption))
                    caption = caption.reason
                captions[source.key] = caption
            progress.advance(len(block))
    bad = [problem for _, problem in problems if problem.reason != SOURCE_GONE]
    if bad and config.captions.on_missing == "error":
        counts = ", ".join(
            f"{count} {name}" for name, count in Counter(problem.reason for problem in bad).most_common()
        )
        examples = "; ".join(problem.detail for problem in bad[:NAMED])
        raise DataError(
            f"{len(bad)} of {len(sources)} images have no usable caption ({counts}): {examples}"
            f"{'; ...' if len(bad) > NAMED else ''}. Write NAME.txt beside each image, "
            "or set captions.on_missing=reject to leave these images out"
        )
    expected = [Reject(name, "text", problem.reason, problem.detail) for name, problem in problems]
    return captions, expected


def has_caption(config: PrepConfig, source: str) -> bool:
    """Tell whether a source has a caption that can be used; False where the dataset has none."""
    try:
        return "text" in config.layers and bool(SidecarCaptions(Path(config.source)).caption(source))
    except BadCaption:
        return False


def look_at_captions(config: PrepConfig, sources: list[str], look_all: LookAll) -> list[str | BadCaption]:
    """Return the hash of the sidecar of each source, or what is wrong with it."""
    sidecars = SidecarCaptions(Path(config.source))

    def read(name: str) -> dict[str, Any] | BadCaption:
        try:
            return {"sha256": sidecars.read(name).provenance["sha256"]}
        except BadCaption as bad:
            return bad

    def known(found: dict[str, Any] | Exception | None) -> Any:
        return found["sha256"] if isinstance(found, dict) else found

    captions = [known(found) for found in look_all([usual_name(source) for source in sources], read)]
    others = [position for position, caption in enumerate(captions) if caption is None]
    if others:  # under another name, or under none
        names = [sidecars.path(sources[position]) for position in others]
        for position, name, found in zip(others, names, look_all(names, read)):
            captions[position] = known(read(name) if found is None else found)
    return captions

"""What every sample's caption is made from, where captions lie beside the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from nanodit.console import Progress
from nanodit.errors import DataError
from prep.captions.servers import SERVERS
from prep.captions.sidecar import SOURCE_GONE, BadCaption, SidecarCaptions, gone_without_caption, look_all_captions
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
    """Return what every sample's text depends on: its caption's fingerprint, or the reason for having none.

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
            asked = [source for source in block if not (source.gone and source.key in committed)]
            looked = look_all_captions(sidecars_of(config), asked, look_all)
            found = {source.key: caption for source, caption in zip(asked, looked)}
            for source in block:
                caption = found.get(source.key, committed.get(source.key, ""))
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
            f"let a model write them (captions.backend={' or '.join(SERVERS)}), or set captions.on_missing=reject to "
            "leave these images out"
        )
    expected = [Reject(name, "text", problem.reason, problem.detail) for name, problem in problems]
    return captions, expected


def sidecars_of(config: PrepConfig) -> SidecarCaptions:
    """Return what reads the captions that came with the images."""
    return SidecarCaptions(Path(config.source), config.captions.origins)


def has_caption(config: PrepConfig, source: str) -> bool:
    """Tell whether a source has a caption that can be used; False where the dataset has none."""
    try:
        return "text" in config.layers and bool(sidecars_of(config).caption(source))
    except BadCaption:
        return False

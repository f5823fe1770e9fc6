"""The caption stage: samples are handed out in small items, and every shard whose samples are through is committed.

Whoever captions an item (``prep/passes/caption_worker.py``) writes only the cache; the text units are committed here,
in the driver. So no slot idles where a shard ends, and a death costs what was under way, which the next round hands out
again. Rounds go on until nothing is open: the second one also asks again about captions that two images share.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from nanodit.console import say
from nanodit.errors import DataError, NanoditError, ResourceError
from nanodit.storage import open_storage
from prep.captions.cache import CACHED_BY
from prep.captions.prompts import Prompts
from prep.captions.quality import Accepted, Answer, Ask, Flaw, caption_text, next_step, next_steps, normalised
from prep.captions.sentences import first_sentence
from prep.captions.sidecar import BadCaption, Caption, ShortCaption, text_sample
from prep.config import PrepConfig
from prep.dataset.layout import Part, Unit, fingerprint_of, read_part, read_range
from prep.dataset.writer import LayerWriter
from prep.passes.caption_worker import CaptionItem, rules_of
from prep.passes.captions import read_prompts
from prep.passes.layers import ShardTask
from prep.passes.sidecars import came_with_images
from prep.passes.supervisor import ERRORS

ITEM = 16  # samples of an item at most
ITEMS_PER_SLOT = 4  # at least, where there are few samples
SHARDS = 1024  # that are open at a time: their answers are held in memory until the last one of a shard arrives
MAX_DEATHS = 3  # rounds in a row that end early without a sample
# recipe of the text units, prompts and items -> the events of ``CaptionWorker.caption`` for all of them
AskAll = Callable[[PrepConfig, Mapping[str, Any], Prompts, Sequence[CaptionItem]], Iterator[dict[str, Any]]]


@dataclass
class Shard:
    """A shard that is being captioned: the answers about each of its samples so far, and what is still asked."""

    task: ShardTask
    keys: list[str]  # those that came without a caption
    came: dict[str, Caption | BadCaption]  # the others
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    shorts: dict[str, tuple[str, list[Answer]]] = field(default_factory=dict)  # a caption, and what came after it
    stays: dict[str, tuple[str, ShortCaption]] = field(default_factory=dict)  # a caption, and what was no short one
    open: dict[str, dict[str, str]] = field(default_factory=dict)  # by key, as ``CaptionItem.taken``
    seconds: float = 0.0

    @property
    def unit(self) -> Unit:
        """What is going to be committed."""
        return Unit(self.task.bucket, self.task.shard, "text")

    @property
    def recipe(self) -> dict[str, Any]:
        """What the captions are made from."""
        return self.task.recipes["text"]


def caption_units(
    config: PrepConfig,
    tasks: Sequence[ShardTask],
    slots: int,
    advance: Callable[[dict[str, Any]], None],
    ask_all: AskAll,
) -> Iterator[list[dict[str, Any]]]:
    """Caption the shards of the tasks and commit their text units; yields for each what ``LayerWorker.run`` returns.

    ``ask_all`` lets workers, with ``slots`` questions at a time, caption items; when some die, its events end early.
    ``advance`` is called after every sample with the counts so far: ``samples`` that are through, ``captioned``
    by a host now, ``cached`` and ``rejected``, and ``hosts`` that answer as "2 of 3". Seconds are those that hosts
    spent on the shard. Raises ResourceError when all hosts are down for longer than ``captions.patience`` or workers
    die again and again, ConfigError when a host cannot do the work; what was captioned until then is kept, also when
    the caller stops.
    """
    stage = CaptionStage(config, slots, advance, ask_all)
    for start in range(0, len(tasks), SHARDS):
        yield from stage.run(tasks[start : start + SHARDS])
    if stage.sentences:
        count = stage.sentences.total()
        reasons = ", ".join(f"{number} {reason}" for reason, number in stage.sentences.most_common())
        say(
            f"{count} short caption{'s are' if count > 1 else ' is'} the first sentence of the long one, because what "
            f"the model answered is none ({reasons})"
        )


class CaptionStage:
    """Hands the samples of shards to workers, and commits what comes back."""

    def __init__(
        self, config: PrepConfig, slots: int, advance: Callable[[dict[str, Any]], None], ask_all: AskAll
    ) -> None:
        self.config, self.slots, self._advance, self._ask_all = config, slots, advance, ask_all
        self.storage, self.prompts = open_storage(config.output), read_prompts(config.captions)
        self.rules, self.short_rules = rules_of(config, self.prompts)
        self.sentences: Counter[str] = Counter()  # in place of short captions, by the flaw of these
        self.counts: dict[str, Any] = {"samples": 0, "captioned": 0, "cached": 0, "rejected": 0}
        self._hosts: dict[str, tuple[int, int]] = {}  # of each worker, those that are up, and all

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[list[dict[str, Any]]]:
        """Caption some shards; see :func:`caption_units`."""
        shards: dict[tuple[str, int], Shard] = {}
        for task in tasks:
            shard = self._open(task)
            # those that have no crop, or a caption already, are through
            self.counts["samples"] += len(task.sources) - len(shard.keys if shard else ())
            if shard and shard.keys:
                shards[task.bucket, task.shard] = shard
            else:
                self._tell()
                yield self._commit(shard) if shard else _done(task, 0, 0.0)
        deaths = 0
        while shards:
            self._hosts.clear()
            items, came = self._items(list(shards.values())), 0
            recipe = next(iter(shards.values())).recipe
            with closing(self._ask_all(self.config, recipe, self.prompts, items)) as events:
                for event in events:
                    if event["kind"] == "failed":
                        raise ERRORS.get(event["exit_code"], NanoditError)(event["error"])
                    if event["kind"] == "defect":
                        raise RuntimeError(f"a caption worker failed:\n{event['trace']}")
                    self._hosts[event["worker"]] = event["up"], event["of"]
                    if event["kind"] == "say":
                        say(event["line"])
                    elif event["kind"] == "sample":
                        came += 1
                        shard = shards.get(place := (event["bucket"], event["shard"]))
                        if shard and self._take(shard, event):
                            del shards[place]
                            yield self._commit(shard)
                    self._tell()
            if lost := sum(len(item.keys) for item in items) - came:
                deaths = 1 if came else deaths + 1
                if deaths == MAX_DEATHS:
                    raise ResourceError(
                        f"actors or nodes died {MAX_DEATHS} times one after another, with {lost} images not captioned. "
                        "The usual cause is memory: see what else runs on the machines, lower captions.slots or "
                        "captions.options.num_ctx, and run the same command again; the captions made so far are kept"
                    )
                say(f"an actor was killed, or died with its node; {lost} images are not captioned and start again")

    def _open(self, task: ShardTask) -> Shard | None:
        """Find the images to caption; None when the unit is committed already."""
        unit, recipe = Unit(task.bucket, task.shard, "text"), task.recipes["text"]
        part = read_part(self.storage, unit)
        if part is not None and part.fingerprint == fingerprint_of(recipe) and "text" not in task.again:
            return None
        crops = upstream = read_part(self.storage, Unit(task.bucket, task.shard, "px"), ["key"])
        if crops is not None and crops.fingerprint != recipe["upstream"]:
            upstream = read_part(self.storage, Unit(task.bucket, task.shard, self.config.upstream("text")), ["key"])
        if crops is None or upstream is None or upstream.fingerprint != recipe["upstream"]:
            raise DataError(
                f"{unit} cannot be captioned: what it is made from disappeared. Run nanodit prep run again to restore "
                "it"
            )
        keys = upstream.table["key"].to_pylist()
        came = dict(came_with_images(self.config, task, part, keys))
        keys = [key for key in keys if key not in came]
        same = part is not None and self.prompts.short and part.fingerprint == fingerprint_of(recipe)
        stays = self._first_sentences(part, set(keys)) if part and same else {}
        return Shard(task, keys, came, stays=stays, open={key: {} for key in keys})

    def _first_sentences(self, part: Part, keys: set[str]) -> dict[str, tuple[str, ShortCaption]]:
        """Return where a unit that is made again with its recipe has the first sentence for want of a short caption.

        An answer that comes now must not replace it: as the recipe stays, its T5 features are not made again.
        """
        found = {}
        for row in part.table.to_pylist():
            key, place = row["key"], [row[f"text/json/{name}"] for name in ("offset", "length", "sha256")]
            if key in keys and row["caption_short"] == first_sentence(row["caption"]):
                short = json.loads(read_range(self.storage, part.unit, key, "json", *place))["short"]
                if "from" in short:
                    found[key] = row["caption"], ShortCaption("", short)
        return found

    def _items(self, shards: Sequence[Shard]) -> list[CaptionItem]:
        """Return what is open in some shards, in items of one size."""
        total = sum(len(shard.open) for shard in shards)
        size = max(1, min(ITEM, math.ceil(total / (ITEMS_PER_SLOT * self.slots))))
        items = []
        for shard in shards:
            keys = list(shard.open)
            for start in range(0, len(keys), size):
                some = tuple(keys[start : start + size])
                taken = {key: shard.open[key] for key in some if shard.open[key]}
                items.append(CaptionItem(shard.task.bucket, shard.task.shard, some, taken))
        return items

    def _take(self, shard: Shard, event: Mapping[str, Any]) -> bool:
        """Keep the answers about one image; whether nothing is open in the shard any more."""
        key = event["key"]
        answers = [Answer(**answer) for answer in event["answers"]]
        if key not in shard.answers:
            self.counts["samples"] += 1
            self.counts["captioned" if event["asked"] else "cached"] += 1
            self.counts["rejected"] += isinstance(next_step(answers, self.rules), Flaw)
        shard.answers[key] = answers
        if "short" in event:
            shard.shorts[key] = event["short_of"], [Answer(**answer) for answer in event["short"]]
        shard.seconds += event["seconds"]
        shard.open.pop(key, None)
        if shard.open:
            return False
        self._share(shard)
        return not shard.open

    def _share(self, shard: Shard) -> None:
        """Open those images again that have the caption of another one, as far as asking again may help.

        So are those with an answer that is a caption of their own, where the short caption follows that of the other.
        """
        captions = {}
        steps = next_steps(shard.answers, self.rules)
        for key, step in steps.items():
            if isinstance(step, Accepted):
                captions[normalised(step.text)] = key
        for key, step in steps.items():
            if isinstance(step, Ask) or (isinstance(step, Accepted) and not self._has_short(shard, key, step)):
                own = {normalised(caption_text(answer)) for answer in shard.answers[key]}
                shard.open[key] = {text: other for text, other in captions.items() if text in own and other < key}

    def _has_short(self, shard: Shard, key: str, step: Accepted) -> bool:
        return not self.prompts.short or shard.shorts.get(key, ("",))[0] == step.text

    def _short(self, shard: Shard, key: str, caption: str) -> ShortCaption | None:
        """Return the short caption of an image whose long one a model wrote."""
        if not self.prompts.short:
            return None
        of, stays = shard.stays.get(key, ("", None))
        if stays and of == caption:
            self.sentences[stays.provenance["reason"]] += 1
            return stays
        step = next_step(shard.shorts[key][1], self.short_rules)
        if isinstance(step, Accepted):
            options = {**shard.recipe["options"], **step.options}
            return ShortCaption(step.text, {"prompt": shard.recipe["short_prompt"], "options": options})
        assert isinstance(step, Flaw)
        self.sentences[step.reason] += 1
        return ShortCaption("", {"from": "sentence", "reason": step.reason})

    def _commit(self, shard: Shard) -> list[dict[str, Any]]:
        """Write the text unit, as ``LayerWorker.text`` does for sidecars."""
        steps = next_steps(shard.answers, self.rules)
        # those that are refused for having the caption of another image had not been counted
        alone = [next_step(shard.answers[key], self.rules) for key, step in steps.items() if isinstance(step, Flaw)]
        self.counts["rejected"] += sum(isinstance(step, Accepted) for step in alone)
        with LayerWriter(self.storage, shard.unit, shard.recipe, facts={}) as writer:
            for key, step in sorted({**shard.came, **steps}.items()):
                if isinstance(step, Flaw | BadCaption):
                    writer.reject(key, step.reason, step.detail)
                    continue
                caption = step
                if isinstance(step, Accepted):
                    provenance = {name: shard.recipe[name] for name in CACHED_BY}
                    provenance["options"] = {**provenance["options"], **step.options}
                    caption = Caption(step.text, provenance, self._short(shard, key, step.text))
                members, columns = text_sample(caption, shard.recipe)
                writer.add(key, members, **columns)
            writer.commit()
            refused = writer.rejected
        self._tell()
        return _done(shard.task, refused, shard.seconds)

    def _tell(self) -> None:
        up, of = (sum(numbers) for numbers in zip(*self._hosts.values(), strict=True)) if self._hosts else (0, 0)
        self._advance(self.counts | {"hosts": f"{up} of {of}"})


def _done(task: ShardTask, rejected: int, seconds: float) -> list[dict[str, Any]]:
    done = {"layer": "text", "device": "captions", "samples": len(task.sources), "rejected": rejected}
    return [done | {"seconds": round(seconds, 3)}]

"""Whether pictures of held-out emoji show the right emoji in the right style, beside what real pictures score.

``python -m tests.datasets.judge_emoji --dataset DATASET --table EMOJI/emoji.csv --pictures FOLDER [--checkpoint RUN]``:
with a checkpoint, first draws the emoji of a part of the holdout from their text alone into FOLDER, one PNG under the
name of the real one. Then judges what lies there. Prints a table.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluate.drawing.arms import DrawingArm, SamplerConfig, draw
from evaluate.metrics.likeness import Judge, open_judge, pixel_features
from evaluate.statistics.intervals import Interval, proportion
from evaluate.subject import Subject, dataset_modalities, read_batches, select_holdout
from nanodit.console import Progress
from nanodit.errors import ConfigError, DataError, NanoditError
from nanodit.rng import generator
from prep.dataset.reader import Dataset, open_version
from train.checkpoint.open import load_model
from train.hardware import pick_device
from train.method.sampling import Guidance

CANDIDATES = 20
BATCH = 64
COLUMNS = (
    "emoji of {}, pixels", "emoji of {}, judge", "style of the emoji's, pixels", "style, colours", "style, judge",
)  # fmt: skip
LEVELS = 8  # of each channel of a colour histogram
RIDGE = 10.0  # of features with variance 1: probes on 4,571 pictures are right as often on others, within .03


@dataclass(frozen=True)
class Shown:
    """Pictures, uint8 (N, H, W, 3), and which emoji and style each is, or was asked to be, (N,) of strings."""

    pictures: np.ndarray
    emoji: np.ndarray
    style: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, places: np.ndarray) -> Shown:
        return Shown(self.pictures[places], self.emoji[places], self.style[places])

    def asked(self, others: Shown) -> Shown:
        """Return these pictures as answers to what ``others`` were asked for."""
        return Shown(self.pictures, others.emoji, others.style)


def colours(pictures: np.ndarray) -> np.ndarray:
    """Return square roots of each picture's shares of 512 colours: uint8 (N, H, W, 3) to float32 (N, 512).

    Each of the icon sets has a palette, by which even their squares and hearts are told apart.
    """
    codes = (pictures // (256 // LEVELS)).astype(np.int64) @ np.array([LEVELS * LEVELS, LEVELS, 1])
    codes = codes.reshape(len(pictures), -1) + LEVELS**3 * np.arange(len(pictures))[:, None]
    counts = np.bincount(codes.ravel(), minlength=LEVELS**3 * len(pictures)).reshape(len(pictures), -1)
    return np.sqrt(counts / codes.shape[1]).astype(np.float32)


def judge_features(judge: Judge, pictures: np.ndarray) -> np.ndarray:
    """Return the judge's class tokens at length 1, float32 (N, width), so that distances follow their cosines."""
    tokens = np.concatenate(
        [judge.features(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    )
    return tokens / np.linalg.norm(tokens, axis=1, keepdims=True)


def found(asked: Shown, features: np.ndarray, real: Shown, others: np.ndarray, candidates: int) -> np.ndarray:
    """Return of which pictures the emoji they were asked to be is the nearest of ``candidates`` real ones, bool (N,).

    The candidates are the right one and, drawn for each emoji and style, others of the same style. ``features`` and
    ``others`` are of the pictures and of the real ones. Raises :class:`DataError` where a style has too few emoji.
    """
    hits = np.zeros(len(asked), bool)
    for index, (emoji, style) in enumerate(zip(asked.emoji.tolist(), asked.style.tolist())):
        of_style = real.style == style
        right, wrong = (np.flatnonzero(of_style & which) for which in (real.emoji == emoji, real.emoji != emoji))
        if not len(right) or len(wrong) < candidates - 1:
            raise DataError(f"{style} {emoji}: the real pictures lack it, or {candidates - 1} others of its style")
        chosen = generator("judge emoji", style, emoji).choice(wrong, candidates - 1, replace=False)
        distances = np.square(others[[right[0], *chosen]] - features[index]).sum(axis=1)
        hits[index] = distances.argmin() == 0
    return hits


def own_style(asked: Shown, features: np.ndarray, real: Shown, others: np.ndarray) -> np.ndarray:
    """Return of which pictures the nearest real one of the same emoji, in any style, has the style asked for, (N,)."""
    hits = np.zeros(len(asked), bool)
    for index, (emoji, style) in enumerate(zip(asked.emoji.tolist(), asked.style.tolist())):
        same = np.flatnonzero(real.emoji == emoji)
        nearest = same[np.square(others[same] - features[index]).sum(axis=1).argmin()]
        hits[index] = real.style[nearest] == style
    return hits


def probe(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the labels that ridge regression from (N, D) to one-hot ``labels`` (N,) gives ``others`` (M, D)."""
    names, places = np.unique(labels, return_inverse=True)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    known, new = ((one - mean) / scale for one in (features.astype(np.float64), others.astype(np.float64)))
    known, new = (np.column_stack([one, np.ones(len(one))]) for one in (known, new))
    gram = known.T @ known + RIDGE * np.eye(known.shape[1])
    weights = np.linalg.solve(gram, known.T @ np.eye(len(names))[places])
    return names[(new @ weights).argmax(axis=1)]


def judged(drawn: Shown, train: Shown, held: Shown, judge: Judge, candidates: int) -> dict[str, list[Interval]]:
    """Return the shares of COLUMNS for ``drawn`` and for three others.

    These are the real held-out pictures; real pictures of the same emoji in another style, which is what a model that
    ignores the style can draw; and the drawn ones as answers to another text of the same style.
    """
    real = Shown(*(np.concatenate(pair) for pair in zip(*(vars(one).values() for one in (train, held)))))
    elsewhere, at = other_style(drawn, real)
    rows = {
        "drawn": drawn,
        "real": held,
        "same emoji, another style": real[elsewhere].asked(drawn[at]),
        "drawn for another text": drawn[np.roll(np.arange(len(drawn)), 1)].asked(drawn),
    }
    spaces = (lambda one: pixel_features(one), lambda one: judge_features(judge, one))
    of_real = [space(real.pictures) for space in spaces]
    palette = colours(train.pictures)
    table = {}
    for name, shown in rows.items():
        own = [space(shown.pictures) for space in spaces]
        right = [found(shown, mine, real, others, candidates) for mine, others in zip(own, of_real)]
        styles = [probe(palette, train.style, colours(shown.pictures))]
        styles.append(probe(of_real[1][: len(train)], train.style, own[1]))
        right += [own_style(shown, own[0], real, of_real[0]), *(style == shown.style for style in styles)]
        table[name] = [proportion(hits, np.ones(len(hits)), shown.emoji.tolist()) for hits in right]
    return table


def other_style(drawn: Shown, real: Shown) -> tuple[np.ndarray, np.ndarray]:
    """Return places of real pictures that show a drawn one's emoji in another style, and those of the drawn ones."""
    first: dict[tuple[str, str], int] = {}
    for place, (emoji, style) in enumerate(zip(real.emoji.tolist(), real.style.tolist())):
        for own in set(drawn.style.tolist()) - {style}:
            first.setdefault((emoji, own), place)
    asked = list(zip(drawn.emoji.tolist(), drawn.style.tolist()))
    at = [place for place, one in enumerate(asked) if one in first]
    return np.array([first[asked[place]] for place in at], np.int64), np.array(at, np.int64)


def shown_in(dataset: Dataset, rows: Sequence[Mapping[str, Any]], table: Mapping[str, Mapping[str, str]]) -> Shown:
    """Return the real pictures of some rows of the index."""
    named = [table[row["source"]] for row in rows]
    pictures = np.stack([dataset.pixels(row) for row in rows])
    return Shown(pictures, *(np.array([one[name] for one in named]) for name in ("emoji", "style")))


def draw_holdout(checkpoint: Path, dataset: Dataset, rows: Sequence[Mapping[str, Any]], options: Any) -> None:
    """Draw the rows from their text alone into ``options.pictures``, under the names of the real ones."""
    model, config, state = load_model(checkpoint)
    data = open_version(dataset.root, state["dataset"]["fingerprint"])
    device = str(pick_device("auto"))
    table = config.conditioning.resolve(dataset_modalities(data))
    subject = Subject(model.to(device), config.flow, table, data, tuple(rows), part=options.part, device=device)
    arm = DrawingArm("text", frozenset({"text"}), Guidance.of(options.guidance))
    options.pictures.mkdir(parents=True, exist_ok=True)
    with Progress("draw", len(rows), "pictures") as progress:
        for batch in read_batches(data, rows, BATCH):
            pictures, wrong = draw(subject, batch, arm, 0, SamplerConfig(steps=options.steps))
            for row, picture, reason in zip(batch.rows, pictures, wrong):
                if reason:
                    raise DataError(f"{row['source']}: the picture drawn for it cannot be judged: {reason}")
                Image.fromarray(picture).save(options.pictures / row["source"])
            progress.advance(len(batch))


def run(options: argparse.Namespace) -> str:
    """Draw if asked to, judge, and return a Markdown table."""
    dataset = Dataset(options.dataset)
    with options.table.open(newline="", encoding="utf-8") as file:
        table = {row["file_name"]: row for row in csv.DictReader(file)}
    rows = select_holdout(dataset, options.samples, None, options.part)
    if options.checkpoint:
        draw_holdout(options.checkpoint, dataset, rows, options)
    judge, reason = open_judge(None, dataset, "cpu")
    if judge is None:
        raise ConfigError(f"no judge for {options.dataset}: {reason}")
    if lacking := [row["source"] for row in rows if not (options.pictures / row["source"]).is_file()]:
        raise DataError(f"{options.pictures} lacks {len(lacking)} of {len(rows)} pictures, {lacking[0]} for one")
    held, train = (shown_in(dataset, some, table) for some in (rows, list(dataset.rows("train"))))
    pictures = np.stack([np.asarray(Image.open(options.pictures / row["source"]).convert("RGB")) for row in rows])
    drawn = Shown(pictures, held.emoji, held.style)
    result = judged(drawn, train, held, judge, options.candidates)
    head = ["pictures", *(name.format(options.candidates) for name in COLUMNS), "n"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, intervals in result.items():
        cells = [f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})" if one.low is not None else f"{one.value:.2f}"
                 for one in intervals]  # fmt: skip
        lines.append(f"| {' | '.join([name, *cells, str(intervals[0].n)])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--table", type=Path, required=True, help="emoji.csv beside the sources of the dataset")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="draws the pictures first")
    parser.add_argument("--part", choices=("test", "dev"), default="test")
    parser.add_argument("--samples", type=int, default=4096, help="at most")
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=20)
    try:
        print(run(parser.parse_args()))
    except NanoditError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

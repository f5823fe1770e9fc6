"""A small dataset of figures held in memory, and models whose answers are known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluate.config import EvaluateConfig
from evaluate.drawing.baselines import load_training_images, round_trip
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.texts import Texts
from evaluate.metrics.examiner import Examiner
from evaluate.metrics.likeness import open_judge
from evaluate.metrics.training_features import TrainFeatures
from evaluate.records import BASELINE, MODEL, REAL
from evaluate.subject import Batch, Subject, random_pairs
from nanodit.files import sha256_bytes
from nanodit.rng import generator, noise
from prep.dataset.buckets import centre_crop, choose_bucket, crop_to_bucket
from prep.dataset.holdout import COLUMN, assign_parts
from prep.encoders.dwpose import normalise
from prep.encoders.registry import build_encoder
from prep.figures.figures import draw_figure
from train.draw.request import encoder_config
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig


class FiguresInMemory:
    """What a :class:`prep.dataset.reader.Dataset` of figures offers to the evaluation, without a disk; features are
    noise."""

    def __init__(self, train: int, holdout: int):
        self.root = Path("figures-in-memory")
        self.fingerprint = "figures"
        layers = {"px": {}, "text": {}, "t5": {"width": 8}, "dino": {"width": 8}, "pose": {}}
        counts = {"samples": train + holdout, "train": train, "holdout": holdout, "rejects": 0}
        self.info = {"base": 64, "encoders": "demo", "layers": layers, "counts": counts}
        self._rows, self._pixels, self._truth = {}, {}, {}
        for index in range(train + holdout):
            figure = draw_figure(5, index, 64, short_caption=True)
            bucket = choose_bucket(*figure.image.size, 64)
            crop = centre_crop(*figure.image.size, bucket)
            key = sha256_bytes(f"figure {index}".encode())[:32]
            keypoints = figure.keypoints.copy()
            keypoints[:, :2] = (keypoints[:, :2] - (crop.left, crop.top)) * crop.scale
            box = (np.reshape(figure.box, (2, 2)) - (crop.left, crop.top)) * crop.scale
            self._pixels[key] = np.asarray(crop_to_bucket(figure.image, bucket))
            self._truth[key] = {
                **figure.attributes,
                "keypoints": keypoints.ravel().tolist(),
                "box": box.ravel().tolist(),
            }
            self._rows[key] = {
                "key": key,
                "source": f"figure-{index:06d}.png",
                "bucket": str(bucket),
                "split": "train" if index < train else "holdout",
                "caption": figure.caption,
                "persons": 1,
                "duplicate_group": None,
                "altered_twin": None,
            }
        held = [key for key, row in self._rows.items() if row["split"] == "holdout"]
        for key, part in assign_parts(dict(zip(held, held))).items():
            self._rows[key][COLUMN] = part

    def together(self) -> FiguresInMemory:
        return self

    def rows(self, split: str | None = None) -> list[dict[str, Any]]:
        return [dict(row) for key, row in sorted(self._rows.items()) if split in (None, row["split"], row.get(COLUMN))]

    def pixels(self, row: dict[str, Any]) -> np.ndarray:
        return self._pixels[row["key"]]

    def truth(self) -> dict[str, dict[str, Any]]:
        return self._truth

    def t5(self, row: dict[str, Any]) -> np.ndarray:
        return generator("t5", row["key"]).standard_normal((12, 8), np.float32)

    def cls(self, row: dict[str, Any]) -> np.ndarray:
        return generator("cls", row["key"]).standard_normal(8, np.float32)

    def patches(self, row: dict[str, Any]) -> np.ndarray:
        height, width = self.pixels(row).shape[:2]
        return generator("patches", row["key"]).standard_normal((height // 8, width // 8, 8), np.float32)

    stored_patches = patches

    def pose(self, row: dict[str, Any]) -> np.ndarray:
        height, width = self.pixels(row).shape[:2]
        keypoints = np.reshape(self._truth[row["key"]]["keypoints"], (-1, 3)).astype(np.float32)
        keypoints[:, 2] = keypoints[:, 2] > 0  # visibility becomes the confidence of a perfect detector
        return normalise(keypoints, width, height)


class Oracle(nn.Module):
    """Predicts a fixed picture for every sample, which it recognises by its noise.

    ``pictures`` maps keys to uint8 (H, W, 3). Works on the sampler's path, whose states are mixtures of that picture
    and the sample's noise, and on the grid of the held-out loss, whose states are mixtures of the truth and the noise.
    """

    def __init__(self, dataset: FiguresInMemory, pictures: dict[str, np.ndarray], noises: int = 10):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self._states: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self._answers: dict[tuple[int, int], list[Tensor]] = {}
        for row in dataset.rows("holdout"):
            height, width = dataset.pixels(row).shape[:2]
            answer, truth = (to_tensor(image) for image in (pictures[row["key"]], dataset.pixels(row)))
            for seed in range(noises):
                e = torch.from_numpy(noise(row["key"], seed, height, width))
                for image in (answer, truth):
                    self._states.setdefault((height, width), []).append((image, e))
                    self._answers.setdefault((height, width), []).append(answer)

    def encode_context(self, conditions, height: int, width: int, *, cache: bool = False):
        return conditions

    def forward(self, z: Tensor, t: Tensor, context) -> Tensor:
        size = tuple(z.shape[2:])
        images, noises = (torch.stack(part) for part in zip(*self._states[size]))
        nearest = []
        for state, time in zip(z, t):
            candidates = (1 - time) * images + time * noises
            nearest.append(int((candidates - state).square().flatten(1).sum(1).argmin()))
        return torch.stack([self._answers[size][index] for index in nearest])


class Constant(nn.Module):
    """Predicts one picture for everything, or echoes z, or breaks."""

    def __init__(self, answer: Callable[[Tensor], Tensor]):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self._answer = answer

    def encode_context(self, conditions, height: int, width: int, *, cache: bool = False):
        return conditions

    def forward(self, z: Tensor, t: Tensor, context) -> Tensor:
        return self._answer(z)


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="session")
def figures() -> FiguresInMemory:
    """40 training and 24 holdout figures of 64 pixels."""
    return FiguresInMemory(40, 24)


@pytest.fixture(scope="session")
def readable_figures() -> FiguresInMemory:
    """24 held-out figures whose texts the demo T5 encodes, so that edits of them can be given."""
    figures = copy(FiguresInMemory(40, 24))
    t5 = build_encoder(encoder_config(figures.info, {}), "t5", "cpu").fingerprint()
    figures.info = {**figures.info, "layers": {**figures.info["layers"], "t5": {"width": 8, "encoder": t5}}}
    texts = Texts(figures)
    figures.t5 = lambda row, flipped=False: texts.embed(row["caption"])
    return figures


@pytest.fixture(scope="session")
def models(figures) -> dict[str, nn.Module]:
    """Models by name: truth, shuffled (another holdout figure of the same bucket), mean_image, noise, black, broken."""
    rows = {row["key"]: row for row in figures.rows("holdout")}
    truth = {key: figures.pixels(row) for key, row in rows.items()}
    pairs = random_pairs(list(rows.values()))
    shuffled = {key: truth[pairs.get(key, key)] for key in truth}
    means = {
        shape: to_tensor(np.mean([image for image in truth.values() if image.shape[:2] == shape], axis=0))
        for shape in {image.shape[:2] for image in truth.values()}
    }
    return {
        "truth": Oracle(figures, truth),
        "shuffled": Oracle(figures, shuffled),
        "mean_image": Constant(lambda z: means[tuple(z.shape[2:])].expand_as(z)),
        "noise": Constant(lambda z: z),
        "black": Constant(lambda z: torch.full_like(z, -1)),
        "broken": Constant(lambda z: torch.full_like(z, float("nan"))),
    }


class Judged:
    """Rows and context as a run of the evaluation hands them to a test, for pictures given instead of drawn."""

    def __init__(self, figures: FiguresInMemory):
        self.figures = figures
        self.judge, _ = open_judge(None, figures, "cpu")
        self._examiner = Examiner(figures, None, None, self.judge)
        self._examiner.no_lpips = None  # neither asked for nor missed
        table = ConditioningConfig(preset="quickstart").resolve()
        self._subject = Subject(nn.Identity(), FlowConfig(), table, figures, tuple(figures.rows("holdout")))
        self._training = load_training_images(figures, {row["bucket"] for row in self._subject.rows}, 40)
        self._references: dict[bool, list[dict[str, Any]]] = {}
        self._train_features: TrainFeatures | None = None

    def context(self, run_folder: Path | None = None, step: int | None = None, **config: Any) -> DrawingContext:
        config = EvaluateConfig.model_validate(config)
        parts = (self._subject, config, self._training, self.judge, None, self._examiner, None)
        context = DrawingContext(*parts, run_folder=run_folder, step=step)
        self._train_features = self._train_features or context.train_features
        context.train_features = self._train_features
        return context

    def rows(self, drawn: dict[tuple[str, int], dict[str, np.ndarray]], detected: bool = False) -> Rows:
        """``drawn`` maps condition and noise to the picture of each key, uint8 (H, W, 3).

        ``detected``: as if the figure's true joints had been found in each.
        """
        if detected not in self._references:
            batches = self._subject.batches()
            self._references[detected] = [row for batch in batches for row in self._real(batch, detected)]
        rows = [dict(row) for row in self._references[detected]]
        for batch in self._subject.batches():
            for (condition, seed), pictures in drawn.items():
                there = [place for place, key in enumerate(batch.keys) if key in pictures]
                if there:
                    images = np.stack([pictures[batch.keys[place]] for place in there])
                    labels = {"kind": MODEL, "condition": condition, "seed": seed, "guidance": 1.0}
                    own = batch.select(there)
                    rows += self._examiner.rows(own, images, joints=self._joints(own) if detected else [], **labels)
        return Rows(sorted(rows, key=lambda row: row["key"]))

    def _joints(self, batch: Batch) -> list[np.ndarray]:
        """The true joints, found with certainty."""
        truth = self.figures.truth()
        joints = [np.reshape(truth[key]["keypoints"], (-1, 3)).astype(np.float32) for key in batch.keys]
        return [np.concatenate([one[:, :2], one[:, 2:] > 0], axis=1) for one in joints]

    def _real(self, batch: Batch, detected: bool) -> list[dict[str, Any]]:
        mean_image = np.rint(self._training.mean_image(batch.bucket)).astype(np.uint8)
        stand_ins = {"mean_image": np.stack([mean_image] * len(batch.rows)), "round_trip": round_trip(batch.pixels)}
        joints = self._joints(batch) if detected else []
        rows = self._examiner.rows(batch, batch.pixels, kind=REAL, condition="real", joints=joints)
        for name, images in stand_ins.items():
            rows += self._examiner.rows(batch, images, kind=BASELINE, condition=name, joints=[])
        return rows


@pytest.fixture(scope="session")
def judged(figures) -> Judged:
    """Pictures of the holdout figures as rows, with the demo judge's features."""
    return Judged(figures)


@pytest.fixture(scope="session")
def known_pictures(figures) -> dict[str, dict[str, np.ndarray]]:
    """What known models draw for each holdout figure; ``copycat`` a training image, ``half`` one for every other."""
    rows = figures.rows("holdout")
    train: dict[str, list[np.ndarray]] = {}
    for row in figures.rows("train"):
        train.setdefault(row["bucket"], []).append(figures.pixels(row))
    truth = {row["key"]: figures.pixels(row) for row in rows}
    pairs, means = random_pairs(rows), {bucket: np.uint8(np.mean(images, 0)) for bucket, images in train.items()}
    copies = {row["key"]: train[row["bucket"]][place % len(train[row["bucket"]])] for place, row in enumerate(rows)}
    return {
        "truth": truth,
        "shuffled": {key: truth[pairs.get(key, key)] for key in truth},
        "mean_image": {row["key"]: means[row["bucket"]] for row in rows},
        "noise": {key: np.uint8(generator("noise", key).integers(0, 256, image.shape)) for key, image in truth.items()},
        "copycat": copies,
        "half": {key: copies[key] if place % 2 else truth[key] for place, key in enumerate(truth)},
    }


@pytest.fixture
def make_subject(figures, models) -> Callable[..., Subject]:
    """``make_subject("truth", batch_size=7)``: one of the models on the holdout figures."""

    def make(
        model: str, rows: Iterable[dict[str, Any]] | None = None, batch_size: int = 32, preset: str = "quickstart"
    ):
        return Subject(
            model=models[model],
            flow=FlowConfig(),
            table=ConditioningConfig(preset="quickstart").resolve(),
            dataset=figures,
            rows=tuple(figures.rows("holdout") if rows is None else rows),
            batch_size=batch_size,
        )

    return make


@pytest.fixture
def quick() -> EvaluateConfig:
    """Few steps: the oracles need no more."""
    return EvaluateConfig.model_validate(
        {
            "tests": ["heldout_loss", "reconstruction", "attributes", "pose"],
            "conditions": {"all": 1.0, "text+pose": 2.0},
            "sampler": {"method": "euler", "steps": 3},
            "heldout_loss": {"bins": 10, "conditions": ["all"]},
            "baseline_images": 40,
            "grid_images": 2,
        }
    )

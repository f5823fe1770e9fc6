"""How far DINO is from mirroring its features when an image is mirrored: why `flips` stores those of both.

    nanodit prep figures FIGURES --count 256 --size 96 --seed 1 --short-captions
    nanodit prep run --config configs/prep/quickstart.yaml source=FIGURES output=DATASET flips=true 'layers=[dino]'
    python tests/benchmarks/dino_flip.py DATASET

Works on any dataset with flips. Printed are cosines of the features of the mirrored crop with those of the crop, taken
in the mirror (what a trainer without them would use), as they are, and with another image's: mean and 5th percentile,
then the same after the mean feature is subtracted, which all tokens share.
"""

from __future__ import annotations

import sys

import numpy as np

from prep.dataset.reader import Dataset
from train.data.flip import flip_pixels

SAMPLES = 256


def cosine(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Cosine of features (..., D)."""
    return (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))


def main() -> None:
    dataset = Dataset(sys.argv[1])
    largest = max(dataset.info["buckets"], key=lambda bucket: dataset.info["buckets"][bucket]["samples"])
    rows = [row for row in dataset.rows() if row["bucket"] == largest][:SAMPLES]
    patches, flipped = (np.stack([dataset.patches(row, flip) for row in rows]) for flip in (False, True))
    cls, cls_flipped = (np.stack([dataset.cls(row, flip) for row in rows]) for flip in (False, True))
    print(f"{dataset.info['layers']['dino'].get('model')}, {len(rows)} images of bucket {largest}; cosine, and centred")
    plain = compare(patches, flipped, cls, cls_flipped)
    mean, cls_mean = patches.mean((0, 1, 2)), cls.mean(0)
    centred = compare(patches - mean, flipped - mean, cls - cls_mean, cls_flipped - cls_mean)
    for name, values in plain.items():
        print(f"{name}: " + ", ".join(f"{v.mean():.3f} ({np.quantile(v, 0.05):.3f})" for v in (values, centred[name])))


def compare(
    patches: np.ndarray, flipped: np.ndarray, cls: np.ndarray, cls_flipped: np.ndarray
) -> dict[str, np.ndarray]:
    """Cosines of patches (N, h, w, D) and class tokens (N, D) of crops and of mirrored crops."""
    mirrored = np.stack([flip_pixels(grid) for grid in patches])
    return {
        "patches, grid mirrored": cosine(flipped, mirrored),
        "patches, grid as it is": cosine(flipped, patches),
        "patches, mirrored grid of another image": cosine(flipped, np.roll(mirrored, 1, axis=0)),
        "CLS": cosine(cls_flipped, cls),
        "CLS of another image": cosine(cls_flipped, np.roll(cls, 1, axis=0)),
    }


if __name__ == "__main__":
    main()

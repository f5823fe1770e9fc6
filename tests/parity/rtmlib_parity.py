"""Compare our DWPose with rtmlib's, joint by joint, on the same ONNX files.

    python -m tests.parity.rtmlib_parity --environment /tmp/rtmlib            # the demo networks on figures
    python -m tests.parity.rtmlib_parity --environment /tmp/rtmlib --detector models/yolox_l.onnx \
        --pose models/dw-ll_ucoco_384.onnx --images photos

rtmlib brings a second onnxruntime and OpenCV, which would take CUDA away from ours: it lives in an environment of its
own, made by this command where ``--environment`` is no such yet. Prints a table; exit code 1 when the people differ, a
corner of a box is further off than ``TOLERANCE``, or more than one joint in a thousand is: rounding a pixel of the crop
the other way can make the neighbouring bin the highest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from PIL import Image

from prep.encoders.demo import ASSETS, DETECTOR, POSE
from prep.encoders.dwpose import DWPose
from prep.figures.figures import draw_figure

ORACLE = Path(__file__).with_name("rtmlib_oracle.py")
PACKAGES = ("numpy", "onnxruntime", "opencv-python-headless", "tqdm")  # of what rtmlib asks for, what is used here
GROUPS = {"body": (0, 17), "feet": (17, 23), "face": (23, 91), "left hand": (91, 112), "right hand": (112, 133)}
SIZES = ((1024, 1024), (832, 1216), (1216, 832), (704, 1344), (640, 640), (96, 64))  # width, height
SEED = 11
TOLERANCE = 0.05  # pixels of the picture


def main() -> int:
    """Run both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="folder of rtmlib's virtual environment")
    parser.add_argument("--detector", type=Path, default=ASSETS / DETECTOR)
    parser.add_argument("--pose", type=Path, default=ASSETS / POSE)
    parser.add_argument("--images", type=Path, help="folder of pictures; default: built-in figures")
    parser.add_argument("--count", type=int, default=60, help="pictures at most")
    options = parser.parse_args()
    images = photographs(options.images, options.count) if options.images else figures(options.count)
    python = environment(options.environment)
    with tempfile.TemporaryDirectory() as folder:
        pictures, answers = Path(folder, "pictures.npz"), Path(folder, "answers.npz")
        np.savez(pictures, **images)
        files = [str(path.absolute()) for path in (options.detector, options.pose, pictures, answers)]
        subprocess.run([python, str(ORACLE), *files], check=True, stdout=subprocess.DEVNULL)
        with np.load(answers) as found:
            theirs = dict(found)
    return report(*compare(images, theirs, DWPose(options.detector, options.pose)))


def environment(folder: Path) -> str:
    """The Python of rtmlib's environment, made on the first call."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "rtmlib"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return str(python)


def figures(count: int) -> dict[str, np.ndarray]:
    """Figures in sizes of the buckets, each moved by a third of its width so that some are cut off."""
    images = {}
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        image = np.asarray(draw_figure(SEED, index, 512).image.resize((width, height)))
        shift = (0, width // 3, -width // 3)[index // len(SIZES) % 3]
        images[f"figure-{index:04d}"] = np.roll(image, shift, axis=1)
    return images


def photographs(folder: Path, count: int) -> dict[str, np.ndarray]:
    """The first pictures of a folder, as RGB."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    return {path.name: np.asarray(Image.open(path).convert("RGB")) for path in paths[:count]}


def compare(
    images: dict[str, np.ndarray], theirs: dict[str, np.ndarray], ours: DWPose
) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """Pictures whose people differ in number, distances of box corners, and per picture those of joints (133,).

    A joint that only one side finds counts as infinitely far off; one that neither finds is NaN.
    """
    differing, corners, joints = 0, [], []
    for name, image in images.items():
        (pose,) = ours.detect(image[None])
        boxes = theirs[f"{name}/boxes"]
        if len(boxes) != pose.persons:
            differing += 1
            continue
        if not pose.persons:
            continue
        corners.append(np.abs(pose.boxes[:, :4] - boxes).max())
        reference = theirs[f"{name}/joints"]
        distance = np.linalg.norm(pose.keypoints[:, :2] - 0.5 - reference[:, :2], axis=1)  # ours are continuous
        # rtmlib takes the mean of the two maxima, DWPose the smaller one: what ours drops, rtmlib may still place
        found = pose.keypoints[:, 2] > 0
        joints.append(np.where(found, np.where(reference[:, 2] > 0, distance, np.inf), np.nan))
    return differing, np.array(corners), joints


def report(differing: int, corners: np.ndarray, joints: list[np.ndarray]) -> int:
    """Print the table; the exit code."""
    table = np.stack(joints)
    print(f"{len(joints)} pictures with people; in {differing} the two find another number of people")
    print(f"corners of boxes: at most {corners.max():.4f} px apart\n")
    print("| joints | compared | equal to .001 px | mean px | worst px | worst joint |")
    print("|---|---|---|---|---|---|")
    for name, (first, last) in {**GROUPS, "all": (0, 133)}.items():
        part = table[:, first:last]
        known = part[~np.isnan(part)]
        if not len(known):
            print(f"| {name} | 0 | | | | |")
            continue
        worst = first + int(np.nanmax(np.where(np.isnan(part), -1, part), axis=0).argmax())
        equal = (known < 1e-3).mean()
        print(f"| {name} | {len(known)} | {equal:.2%} | {known.mean():.4f} | {known.max():.4f} | {worst} |")
    off = (table[~np.isnan(table)] > TOLERANCE).mean()
    return int(differing > 0 or corners.max() > TOLERANCE or off > 0.001)


if __name__ == "__main__":
    sys.exit(main())

"""What rtmlib makes of pictures; run by ``rtmlib_parity.py`` with the Python of rtmlib's own environment.

``python rtmlib_oracle.py DETECTOR POSE PICTURES.npz ANSWERS.npz``: knows nothing of this project.
"""

import sys

import numpy as np
from rtmlib import YOLOX, RTMPose

PERSON_SCORE, PERSON_CLASS = 0.3, 0  # DWPose's own; rtmlib's default is .7


def main() -> None:
    """Detect in BGR, estimate the largest person's joints in RGB: what each of the two networks was trained on."""
    detector_file, pose_file, pictures, answers = sys.argv[1:]
    detector = YOLOX(detector_file, (640, 640), det_mode="multiclass", score_thr=PERSON_SCORE)
    pose = RTMPose(pose_file, (288, 384))
    found = {}
    with np.load(pictures) as images:
        for name, rgb in images.items():
            boxes, classes = detector(np.ascontiguousarray(rgb[..., ::-1]))
            boxes = np.asarray(boxes, np.float32).reshape(-1, 4)[np.asarray(classes, int) == PERSON_CLASS]
            boxes = boxes[np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")]
            found[f"{name}/boxes"] = boxes
            if len(boxes):
                keypoints, scores = pose(rgb, [boxes[0]])
                found[f"{name}/joints"] = np.concatenate([keypoints[0], scores[0][:, None]], axis=1)
    np.savez(answers, **found)


if __name__ == "__main__":
    main()

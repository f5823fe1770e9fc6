"""The picture a person looks at while a run trains: holdout samples, and what the model makes of their conditions."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from nanodit.console import say
from nanodit.errors import ConfigError
from nanodit.files import write_atomic
from nanodit.rng import noise
from train.config import TrainConfig
from train.data.samples import Row, load_conditions, load_pixels
from train.method.sampling import Guidance, sample, to_uint8, trajectory_keep_ids
from train.model.conditions import Conditions, Subset, parse_subset, subset_name
from train.model.network import NanoDiT

CELL = 160  # smaller images are enlarged by a whole factor to about this
GAP = 4
LABEL_WIDTH, HEAD_HEIGHT = 84, 16
LETTER = 6, 14  # about the width of a letter, and the height of a line, in Pillow's own font
ARMS = ("all", "text+pose", "text")  # as far as the dropout table trains them


class VisualDebug:
    """Draws the same holdout samples, from the same noise, every time: real | all | text+pose | text.

    Raises :class:`ConfigError` for guidance away from what was never trained: conditions that are not in ``table``, or
    a routed network.
    """

    def __init__(self, config: TrainConfig, dataset: Any, table: Mapping[Subset, float]) -> None:
        self.config = config
        debug = config.visual_debug
        rows = dataset.rows("dev")
        count = min(debug.count, len(rows))
        self.rows = [rows[i * len(rows) // count] for i in range(count)]  # spread evenly over the keys
        self._dataset = dataset
        modalities = frozenset().union(*table)
        arms = (parse_subset(name) & modalities for name in ARMS)
        self.arms = [arm for arm in dict.fromkeys(arms) if arm and arm in table] or [max(table, key=len)]
        self._modalities = modalities
        if debug.every_steps > 0:
            self._check_guidance(table)
            if not self.rows:
                say(f"warning: {dataset.root} has no holdout images of the part dev, so visual_debug draws nothing")

    @property
    def captions(self) -> list[str]:
        """Number, key and caption of each column."""
        return [f"{i + 1}. {row['key']}: {row.get('caption') or ''}" for i, row in enumerate(self.rows)]

    @staticmethod
    def folder(run_folder: Path, step: int) -> Path:
        """Where the files of a step are."""
        return run_folder / "visual_debug" / f"step-{step:06d}"

    def draw(self, model: NanoDiT, step: int, run_folder: Path) -> np.ndarray | None:
        """Write ``visual_debug/step-NNNNNN/grid.png``, for :func:`cut_out` too, and captions.txt.

        Returns the grid, uint8 (H, W, 3); None where the dataset has no holdout.
        """
        if not self.rows:
            return None
        columns: dict[str, list[np.ndarray]] = {}
        for bucket in dict.fromkeys(row["bucket"] for row in self.rows):
            rows = [row for row in self.rows if row["bucket"] == bucket]
            columns.update(zip((row["key"] for row in rows), self._columns(model, rows)))
        labels = ["real", *(subset_name(arm, self._modalities) for arm in self.arms)]
        shown = [columns[row["key"]] for row in self.rows]
        grid = lay_out(shown, labels)
        folder = self.folder(run_folder, step)
        info, png = PngInfo(), io.BytesIO()
        sizes = [[column[0].shape[1], column[0].shape[0]] for column in shown]
        info.add_text("layout", json.dumps({"rows": labels, "keys": [row["key"] for row in self.rows], "sizes": sizes}))
        Image.fromarray(grid).save(png, "PNG", pnginfo=info)
        write_atomic(folder / "captions.txt", "\n".join(self.captions) + "\n")
        write_atomic(folder / "grid.png", png.getvalue())
        say(f"step {step}: {folder / 'grid.png'}")
        return grid

    def _check_guidance(self, table: Mapping[Subset, float]) -> None:
        guidance = Guidance.of(self.config.visual_debug.guidance)
        for arm in self.arms:
            sampling = self.config.visual_debug.sampling(arm)
            if lacking := [needed for needed in sampling.chain(arm) if needed not in table]:
                name = subset_name(lacking[0], self._modalities)
                raise ConfigError(
                    f"visual_debug.guidance {guidance}: the dropout table never trains `{name}`, from which guidance "
                    f"leads away; set it to 1, or give `{name}` a share in conditioning.table"
                )
            if sampling.self_guidance != 1 and not self.config.tread.enabled:
                raise ConfigError(
                    f"visual_debug.guidance {guidance}: without routing there is no weaker network to lead away from; "
                    "set it to 1, or tread.enabled to true"
                )

    def _columns(self, model: NanoDiT, rows: Sequence[Row]) -> list[list[np.ndarray]]:
        """Return for each row of one bucket its images from top to bottom."""
        real = load_pixels(self._dataset, rows)
        conditions = load_conditions(self._dataset, rows)
        height, width = real.shape[2:]
        start = torch.from_numpy(np.stack([noise(row["key"], 0, height, width) for row in rows]))
        tokens = height * width // self.config.model.patch_size**2
        keep_ids = trajectory_keep_ids(self.config.tread, [(row["key"], 0) for row in rows], tokens)
        images = [to_uint8(real)]
        for arm in self.arms:
            kept: Conditions = conditions.keeping(arm)
            sampling = self.config.visual_debug.sampling(arm)
            drawn = sample(model, kept, start, flow=self.config.flow, sampling=sampling, keep_ids=keep_ids)
            images.append(to_uint8(drawn))
        return [list(column) for column in zip(*images)]


def lay_out(columns: Sequence[Sequence[np.ndarray]], labels: Sequence[str], heads: Sequence[str] = ()) -> np.ndarray:
    """Place columns of images, uint8 (H, W, 3) of any sizes, on one white sheet with a label before each row.

    Labels are wrapped, and cut where a row has no room for more. ``heads`` are what stands above the columns, if
    anything.
    """
    largest = max(max(image.shape[:2]) for column in columns for image in column)
    factor = max(1, round(CELL / largest))
    cell_width = max(image.shape[1] for column in columns for image in column) * factor + GAP
    cell_height = max(image.shape[0] for column in columns for image in column) * factor + GAP
    above = HEAD_HEIGHT if heads else 0
    size = LABEL_WIDTH + len(columns) * cell_width + GAP, above + len(labels) * cell_height + GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((LABEL_WIDTH + (column + 0.5) * cell_width, GAP), head, fill="black", anchor="ma")
    for row, label in enumerate(labels):
        lines = textwrap.wrap(
            label, LABEL_WIDTH // LETTER[0], max_lines=max(1, cell_height // LETTER[1]), placeholder=" ..."
        )
        middle = above + GAP + (row + 0.5) * cell_height
        pen.text((GAP, middle), "\n".join(lines), fill="black", anchor="lm", spacing=2)
        for column, images in enumerate(columns):
            image = Image.fromarray(images[row])
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            left = GAP + LABEL_WIDTH + column * cell_width + (cell_width - GAP - image.width) // 2
            top = above + GAP + row * cell_height + (cell_height - GAP - image.height) // 2
            sheet.paste(image, (left, top))
    return np.asarray(sheet)


def cut_out(sheet: Image.Image) -> dict[str, dict[str, Image.Image]]:
    """Cut a grid.png into its pictures: label of the row -> key of the sample -> picture as it is shown there.

    Empty for a sheet that does not say how it is laid out.
    """
    layout = json.loads(sheet.info.get("layout", "{}"))
    if not layout:
        return {}
    sizes = layout["sizes"]
    factor = max(1, round(CELL / max(map(max, sizes))))
    cell_width, cell_height = (max(size[axis] for size in sizes) * factor + GAP for axis in (0, 1))
    found: dict[str, dict[str, Image.Image]] = {}
    for row, label in enumerate(layout["rows"]):
        for column, (key, size) in enumerate(zip(layout["keys"], sizes)):
            width, height = (side * factor for side in size)
            left = GAP + LABEL_WIDTH + column * cell_width + (cell_width - GAP - width) // 2
            top = GAP + row * cell_height + (cell_height - GAP - height) // 2
            found.setdefault(label, {})[key] = sheet.crop((left, top, left + width, top + height))
    return found

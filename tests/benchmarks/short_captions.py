"""What ``data.short_captions`` does to prompts of ten words, on figures with captions of 50 words.

``python -m tests.benchmarks.short_captions FOLDER`` draws and prepares the figures, trains a small network for each
share, and judges the colours of the holdout's pictures given long captions and short ones. What is there stays. The
short captions name the same colours in another sentence, as a model would write them; with ``--first`` they are the
first sentence of the long ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq

from nanodit.config import load_config
from nanodit.files import write_atomic
from prep.captions import sidecar
from prep.config import PrepConfig
from prep.figures.figures import write_figures
from tests.prep.prepared import prepare

SENTENCE = "A {person} with {hair} hair, {top} top, {trousers} trousers, {background} wall."
MODEL = "model.hidden_size=128 model.depth=4 model.num_heads=2 train.compile=false train.threads=1 data.workers=1"
SHARES = (0.0, 0.5)
GUIDANCE = "{text: 2.0}"


def write_dataset(folder: Path, count: int, first: bool) -> None:
    """Draw figures and prepare them; ``first``: the short sentence is put before what is said of each."""
    source = folder / "figures"
    if (folder / "dataset" / "dataset.json").exists():
        return
    write_figures(source, count, 96, seed=1, short_captions=True, workers=1)
    shorts = {}
    for row in pq.read_table(source / "truth.parquet").to_pylist():
        file, short = (source / row["file"]).with_suffix(".txt"), SENTENCE.format(**row)
        text = file.read_text(encoding="utf-8").strip()
        if first and not text.startswith(short):
            text = f"{short} {text}"
            write_atomic(file, text)
        shorts[text] = short
    given = [f"source={source}", f"output={folder / 'dataset'}", "base=64", "encoders=demo", "layers=[text]"]
    with mock.patch.object(sidecar, "first_sentence", shorts.__getitem__):  # in place of a model that looks at pictures
        prepare(load_config(PrepConfig, None, [*given, "captions.short=true", "holdout=0.1"]))


def nanodit(*words: str) -> None:
    """Run a command of one thread."""
    subprocess.run([sys.executable, "-m", "nanodit", *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> None:
    """Do what is missing, and print what was judged right, with its interval and the number of pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1500, help="figures")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--share", type=float, action="append", help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--first", action="store_true", help="the short caption begins the long one")
    options = parser.parse_args()
    folder = options.folder
    write_dataset(folder, options.count, options.first)
    for share in options.share or SHARES:
        run = folder / f"share-{share:g}-seed-{options.seed}"
        nanodit(
            "train", "run", "--config", "configs/train/quickstart.yaml", f"dataset={folder / 'dataset'}",
            f"output={run}", "conditioning={preset: null, table: {text: 0.9, nothing: 0.1}}", *MODEL.split(),
            f"train.steps={options.steps}", "visual_debug.every_steps=0", f"checkpoint.every_steps={options.steps}",
            f"data.short_captions={share:g}", f"seed={options.seed}",
        )  # fmt: skip
        for captions in ("long", "short"):
            out = folder / f"{run.name}-{captions}"
            if not (out / "report.json").exists():
                nanodit(
                    "evaluate", "run", "--checkpoint", str(run), "--config", "configs/evaluate/quickstart.yaml",
                    "tests=[attributes]", "needed={}", "samples=128", f"conditions={GUIDANCE}", f"captions={captions}",
                    "--output", str(out),
                )  # fmt: skip
            for metric in json.loads((out / "report.json").read_text(encoding="utf-8"))["metrics"]:
                bounds = f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
                print(f"share {share:g}, {captions} captions: {metric['name']} {bounds}, n {metric['n']}", flush=True)


if __name__ == "__main__":
    main()

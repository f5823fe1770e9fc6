"""What the documents say of files, columns and code is so: their examples run, and every column has a line."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from prep.dataset.reader import Dataset
from tests.test_imports import FLOORS
from tests.train.tiny import write_dataset
from train.method.sampling import sampling_times
from train.sweep.config import load_sweep

ROOT = Path(__file__).parent.parent
FORMAT, GUIDE, MAP = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("docs/dataset-format.md", "CONTRIBUTING.md", "ARCHITECTURE.md")
)
TABLES = ("index", "manifest", "rejects", "truth")
PATHS = re.compile(r"`((?:nanodit|prep|train|evaluate|tests|docs|configs)/[\w./-]*?)`")
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/dataset-format.md",
    "docs/measurements.md",
    "docs/seed.md",
)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced code blocks of a document that name a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def named() -> set[str]:
    """Return everything that the format's document names in code type."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", FORMAT, flags=re.MULTILINE | re.DOTALL)))


def without_a_line(columns: list[str]) -> set[str]:
    """Return the columns that the document does not name; those of a member are named by their layer and member."""
    members = {f"{layer}/{member}" for layer, line in re.findall(r"^\| `(\w+)` \| (`[^|]+`) \|", FORMAT, re.MULTILINE)
               for member in re.findall(r"`([\w.]+)`", line)}  # fmt: skip
    ends = {name.removeprefix("LAYER/MEMBER/") for name in named() if name.startswith("LAYER/MEMBER/")}
    layers = {member.partition("/")[0] for member in members}
    known = named() | {f"{layer}/fingerprint" for layer in layers if "LAYER/fingerprint" in named()}
    known |= {f"{member}/{end}" for member in members for end in ends}
    return set(columns) - known


def run_block(language: str, word: str) -> dict:
    """Run the code block of CONTRIBUTING.md that holds ``word``; returns the names that it defines."""
    (code,) = (block for block in blocks(GUIDE, language) if word in block)
    names: dict = {"__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_reader_of_the_document_reads_what_ours_reads(figures_dataset, tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "dataset").symlink_to(figures_dataset)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(FORMAT, "python")
    assert len(code.splitlines()) <= 30
    assert {line.split()[1] for line in re.findall(r"^(?:import|from) .*", code, re.MULTILINE)} <= {
        "hashlib,", "pathlib", "numpy", "pyarrow.parquet", "PIL"
    }  # fmt: skip
    read: dict = {}
    exec(compile(code, "docs/dataset-format.md", "exec"), read)
    dataset = Dataset(figures_dataset)
    row = dataset.rows("train")[0]
    assert read["row"] == row
    for name, ours in {"pixels": dataset.pixels, "tokens": dataset.t5, "joints": dataset.pose}.items():
        np.testing.assert_array_equal(read[name], ours(row), err_msg=name)
    np.testing.assert_array_equal(read["patches"], dataset.patches(row))


@pytest.mark.parametrize("flips", [False, True])
def test_every_column_and_field_of_a_dataset_has_a_line(flips, figures_dataset, tmp_path):
    root = write_dataset(tmp_path / "dataset") if flips else figures_dataset
    tables = [root / f"{name}.parquet" for name in TABLES]
    parts = sorted(root.glob("parts/*.parquet"))
    assert len(parts) > 4
    for table in [*(table for table in tables if table.exists()), *parts]:
        schema = pq.read_schema(table)
        assert not without_a_line(schema.names), table.name
        if table.parent.name == "parts":
            record = json.loads(schema.metadata[b"nanodit"])
            assert not record.keys() - named(), table.name
            assert flips or not record["recipe"].keys() - named(), table.name
    info = json.loads((root / "dataset.json").read_text())
    fields = info.keys() | info["layers"].keys() | {field for layer in info["layers"].values() for field in layer}
    assert not fields - named()
    assert not {*info["hashes"], *info.get("counts", ()), *info.get("stages", ())} - named()


def test_a_column_without_a_line_is_seen():
    assert without_a_line(["caption", "mood", "px/webp/offset", "px/png/offset", "dino/cls_flip.npy/sha256"]) == {
        "mood", "px/png/offset"
    }  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = [
        path for path in PATHS.findall(text) if not path.endswith(".patch")
    ]  # tests/extensions has a test of its own
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_example_of_a_sampler_is_exact_with_an_oracle_and_of_second_order():
    midpoint = run_block("python", "def midpoint")["midpoint"]
    x, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)

    def on_step(t, z):
        torch.testing.assert_close(z, (1 - t) * x + t * noise, atol=1e-4, rtol=0)

    for steps in (1, 2, 7):
        end = midpoint(lambda z, t: x, noise, sampling_times(steps, 3.0, "cosine"), on_step)
        torch.testing.assert_close(end, x, atol=1e-4, rtol=0)
    # data ~ N(0, .25): all is linear in z, and exact is z = spread(t) / spread(1)
    spread = lambda t: ((1 - t) ** 2 * 0.25 + t**2) ** 0.5  # noqa: E731
    denoise = lambda z, t: z * ((1 - t) * 0.25 / spread(t) ** 2)  # noqa: E731
    start = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    errors = [abs(float(midpoint(denoise, start, np.linspace(1, 0.2, n + 1))) - spread(0.2)) for n in (20, 40)]
    assert errors[0] / errors[1] > 3.5


def test_the_example_of_an_encoder_gives_what_a_unit_is_written_from():
    names = run_block("python", "class ColourEncoder")
    encoder = names["ColourEncoder"]("cpu")
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 80, 3), dtype=np.uint8)
    means = images.reshape(5, 8, 6, 8, 10, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(encoder.encode(images), means, atol=1e-6)
    encoder.memory.limit = 2  # as after a batch that did not fit
    stored = [np.load(io.BytesIO(members["colours.npy"])) for members, columns in encoder.samples(images)]
    np.testing.assert_allclose(np.stack(stored), means, atol=1e-6)
    assert {array.dtype for array in stored} == {np.dtype(np.float32)}
    assert encoder.fingerprint() == names["fingerprint"]() == json.loads(json.dumps(encoder.fingerprint()))


def test_the_example_of_an_arm_is_a_sweep_without_undeclared_differences(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (block,) = blocks(GUIDE, "yaml")
    file = tmp_path / "configs" / "sweep" / "example.yaml"
    file.write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arms = load_sweep(file).record(1, False)["arms"]
    assert arms["wsd"]["differences"] == {"train.schedule": ["cosine", "wsd"]}
    assert arms["wsd_half"]["differences"] == {"train.decay_share": [0.25, 0.5]}
    assert [arm["role"] for arm in arms.values()] == ["baseline", "arm", "arm"]
    assert not any(arm["undeclared"] for arm in arms.values())


@pytest.mark.parametrize("package", FLOORS)
def test_the_map_shows_every_folder_and_the_floors(package):
    tree = re.search(rf"^{package}/ .*\n((?:  .*\n)*)", MAP, flags=re.MULTILINE)
    shown = {line.split()[0] for line in tree[1].splitlines()}
    folders = {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert shown == folders | files, "ARCHITECTURE.md: give each folder and file its line in the tree"
    assert f"{package:<11}{' < '.join(FLOORS[package])}\n" in MAP, "ARCHITECTURE.md: give it a floor"


def test_the_tests_that_the_table_of_the_first_text_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/seed.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    for file, test in named:
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)

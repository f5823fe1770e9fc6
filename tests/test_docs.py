"""What the documents say of files, columns and code is so: their examples run, and every column has a line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prep.dataset.reader import Dataset
from tests.train.tiny import write_dataset

ROOT = Path(__file__).parent.parent
FORMAT = (ROOT / "docs" / "dataset-format.md").read_text(encoding="utf-8")
TABLES = ("index", "manifest", "rejects", "truth")
PATHS = re.compile(r"`((?:nanodit|prep|train|evaluate|tests|docs|configs)/[\w./-]*?)`")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/dataset-format.md", "docs/measurements.md")


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
    assert not [path for path in PATHS.findall(text) if not (ROOT / path).exists()]

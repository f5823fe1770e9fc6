"""A run with nothing new reads what was published and joins nothing; anything that changed is noticed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nanodit.errors import DataError
from nanodit.files import sha256_file
from prep.config import PrepConfig
from prep.dataset.layout import part_schema
from prep.passes import last_publication, publish
from prep.passes.plan import make_plan
from prep.run import current_parts
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare

FILES = ("index.parquet", "rejects.parquet", "dataset.json")


class Joined(Exception):
    """Raised where a publication begins in earnest."""


def stop(*arguments: object) -> None:
    raise Joined


@pytest.fixture
def published(tmp_path: Path) -> PrepConfig:
    settings = config(tmp_path)
    write_images(tmp_path / "source", 4)
    prepare(settings)
    return settings


def again(settings: PrepConfig) -> publish.Published:
    plan = make_plan(settings)
    assert not plan.missing
    return publish.publish(plan, current_parts(plan), "runs/rejects.parquet")


def test_nothing_is_joined_where_nothing_changed(published, monkeypatch):
    first = again(published)
    monkeypatch.setattr(publish, "collect", stop)
    assert again(published) == first
    assert first.changed == []
    assert first.warnings  # four samples are too few for a holdout, and that is said every time


@pytest.mark.parametrize("change", ["config", "code", "damage", "missing", "record", "no record", "reject"])
def test_what_changed_is_noticed(published, monkeypatch, change):
    root = Path(published.output)
    if change == "config":
        published = published.model_copy(update={"holdout": 0.5})
    elif change == "code":
        monkeypatch.setattr(last_publication, "__version__", "another")
    elif change == "damage":
        (root / "index.parquet").write_bytes(b"PAR1")
    elif change == "missing":
        (root / "rejects.parquet").unlink()
    elif change == "record":
        (root / last_publication.NAME).write_text('{"inputs": ')
    elif change == "no record":
        (root / last_publication.NAME).unlink()
    else:
        (Path(published.source) / "broken.png").write_bytes(b"\x89PNG")
    monkeypatch.setattr(publish, "collect", stop)
    with pytest.raises(Joined):
        again(published)


def test_a_lost_table_is_written_again_with_the_same_bytes(published):
    root = Path(published.output)
    before = {name: sha256_file(root / name) for name in FILES}
    (root / "rejects.parquet").unlink()
    assert again(published).changed == ["rejects.parquet"]
    assert {name: sha256_file(root / name) for name in FILES} == before


def test_a_part_that_changes_after_the_plan_stops_the_publication(published):
    plan = make_plan(published)
    parts = current_parts(plan)
    path = Path(published.output) / next(iter(parts)).part
    path.write_bytes(path.read_bytes()[:-1])
    (Path(published.output) / last_publication.NAME).unlink()
    with pytest.raises(DataError, match="has changed since the run began"):
        publish.publish(plan, parts, "runs/rejects.parquet")


def test_columns_beyond_what_one_array_holds_are_cut(monkeypatch):
    texts = [f"{number}" * (number % 5) for number in range(100)]
    rows = pa.array(np.random.default_rng(0).permutation(100))
    for column in (pa.chunked_array([texts[:60], texts[60:]]), pa.chunked_array([[b"x", None] * 50])):
        whole = publish._take(column, rows)
        monkeypatch.setattr(publish, "ONE_ARRAY", 64)
        cut = publish._take(column, rows)
        monkeypatch.undo()
        assert cut.num_chunks > 3
        assert cut.type == column.type
        assert cut.to_pylist() == whole.to_pylist() == [column[row].as_py() for row in rows.to_pylist()]


def test_the_index_has_the_columns_of_the_parts_in_the_order_of_the_layers(published):
    plan = make_plan(published)
    table = publish.join_layers(plan, current_parts(plan))
    recipes = {unit.layer: recipe for unit, recipe in plan.recipes.items()}
    parts = {name for layer in ("px", "text", "t5") for name in part_schema(layer, recipes[layer]).names}
    assert parts | {f"{layer}/fingerprint" for layer in recipes} <= set(table.column_names)
    assert table["key"].to_pylist() == sorted(plan.sources)
    assert [plan.sources[key].name for key in table["key"].to_pylist()] == table["source"].to_pylist()

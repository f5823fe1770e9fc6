"""Samples that a person takes out of the next version, and back into a later one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanodit.errors import ConfigError, DataError
from nanodit.lock import locked
from prep.__main__ import main
from prep.config import PrepConfig
from prep.dataset.excluded import NAME
from prep.dataset.reader import Dataset
from prep.exclude import exclude
from prep.passes.plan import make_plan
from prep.passes.publish import publish
from prep.run import current_parts
from prep.verify.verify import verify
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare
from tests.prep.runs import files_of, rejects_of


@pytest.fixture
def settings(tmp_path: Path) -> PrepConfig:
    settings = config(tmp_path, max_reject_rate=0.0)
    write_images(tmp_path / "source", 5)
    prepare(settings)
    return settings


def published(settings: PrepConfig) -> dict[str, str]:
    """Publish again, and return the files' names of the samples by key."""
    plan = make_plan(settings)
    assert not plan.missing
    publish(plan, current_parts(plan), "runs/rejects.parquet")
    return {row["key"]: row["source"] for row in Dataset(settings.output).rows()}


def test_excluded_samples_are_left_out_and_come_back_without_a_computation(settings: PrepConfig) -> None:
    samples, before = published(settings), files_of(Path(settings.output))
    first, second, *others = samples
    exclude(settings.output, [samples[first], second[:8].upper()])
    assert list(published(settings)) == others
    detail = ("publish", "excluded")
    assert rejects_of(Path(settings.output)) == {samples[first]: detail, samples[second]: detail}
    verify(settings.output)  # no file is taken for an orphan, no leak is seen
    assert make_plan(settings).notes[-1].startswith("2 of 5 samples are excluded")
    exclude(settings.output, [second], include=True)
    assert second in published(settings)
    exclude(settings.output, [first], include=True)
    assert published(settings) == samples
    (Path(settings.output) / NAME).unlink()
    after = files_of(Path(settings.output))
    assert {name: after[name] for name in before} == before


def test_excluded_samples_can_be_read_in_the_earlier_version(settings: PrepConfig) -> None:
    samples = published(settings)
    earlier = Dataset(settings.output).fingerprint
    key = next(iter(samples))
    exclude(settings.output, [key])
    published(settings)
    assert key in {row["key"] for row in Dataset(settings.output, version=earlier).rows()}


def test_a_sample_that_comes_back_is_on_the_side_that_it_was_on(tmp_path: Path) -> None:
    settings = config(tmp_path, shard_size=10)
    write_images(tmp_path / "source", 10)
    prepare(settings)
    sides = {row["key"]: row["split"] for row in Dataset(settings.output).rows()}
    parts = {row["key"]: row["holdout_part"] for row in Dataset(settings.output).rows()}
    held = [key for key in sides if sides[key] == "holdout"]
    trained = next(key for key in sides if sides[key] == "train")
    assert len(held) == 2
    exclude(settings.output, [trained, *held])
    file = Path(settings.output) / NAME
    record = json.loads(file.read_text())
    assert record["parts"] == {key: parts[key] for key in held}
    others = {key: {"test": "dev", "dev": "test"}[parts[key]] for key in held}  # which no draw would give both
    file.write_text(json.dumps(record | {"parts": others}))
    published(settings)
    exclude(settings.output, [trained], include=True)  # there is room in the holdout
    published(settings)
    write_images(tmp_path / "source", 12)  # further samples of the holdout have taken their places
    settings = settings.model_copy(update={"holdout": 0.4})
    prepare(settings)
    exclude(settings.output, held, include=True)
    published(settings)
    after = {row["key"]: row for row in Dataset(settings.output).rows()}
    assert {key: after[key]["split"] for key in sides} == sides
    assert {key: after[key]["holdout_part"] for key in held} == others


def test_nothing_is_changed_where_a_name_is_not_known(settings: PrepConfig) -> None:
    key, *_ = published(settings)
    with pytest.raises(ConfigError) as error:
        exclude(settings.output, [key, "image-00l.png", key[:3]])
    lines = str(error.value).splitlines()
    assert lines[0] == "nothing was changed:"
    assert "image-00l.png: no such key or file; is it image-00" in lines[1]
    assert f"{key[:3]}: no such key or file" in lines[2]
    assert not (Path(settings.output) / NAME).exists()


def test_all_excluded_publishes_nothing(settings: PrepConfig) -> None:
    samples, before = published(settings), files_of(Path(settings.output))
    exclude(settings.output, list(samples))
    with pytest.raises(DataError, match=r"nothing was accepted.* 5 of 5 sources were rejected \(5 excluded\)"):
        published(settings)
    after = files_of(Path(settings.output))
    assert {name: after[name] for name in before} == before


def test_a_damaged_list_and_a_place_without_a_dataset_are_errors(settings: PrepConfig, tmp_path: Path) -> None:
    published(settings)
    (Path(settings.output) / NAME).write_text('{"keys": 3}')
    with pytest.raises(DataError, match=r"excluded.json is damaged .* or delete it to exclude nothing"):
        make_plan(settings)
    with pytest.raises(DataError, match="holds no dataset"):
        exclude(str(tmp_path / "nowhere"), [])
    assert not (tmp_path / "nowhere").exists()


def test_the_command_lists_changes_and_waits_for_no_run(
    settings: PrepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    key, *_ = published(settings)
    capsys.readouterr()
    assert main(["exclude", settings.output, key]) == 0
    out = capsys.readouterr().out
    assert "1 sample excluded, 1 excluded in all" in out
    assert "publishes the version without them" in out
    assert main(["exclude", settings.output]) == 0
    assert key in capsys.readouterr().out
    assert main(["exclude", settings.output, key, "--include"]) == 0
    out = capsys.readouterr().out
    assert "1 sample taken in again, 0 excluded in all" in out
    assert "publishes the version with them" in out
    with locked(settings.output), pytest.raises(ConfigError, match="is being written by another prep run"):
        main(["exclude", settings.output, key])

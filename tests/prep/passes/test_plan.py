"""The plan: membership of shards, what is missing and why; nothing here computes a layer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanodit.errors import ConfigError, DataError
from prep.config import PrepConfig
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Unit
from prep.dataset.writer import LayerWriter
from prep.passes.plan import assign_shards, make_plan, read_manifest, write_manifest
from prep.run import current_parts

MEMBERS = st.dictionaries(st.text("0123456789abcdef", min_size=3, max_size=3), st.sampled_from(["a", "b"]), max_size=40)


def write_images(folder: Path, count: int, size: tuple[int, int] = (80, 64), first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image-{number:03d}.png")
        (folder / f"image-{number:03d}.txt").write_text(f"Picture number {number}.")


def config(tmp_path: Path, **changes) -> PrepConfig:
    fields = {"base": 64, "encoders": "demo", "layers": ["text"], "shard_size": 3} | changes
    return PrepConfig(source=str(tmp_path / "source"), output=str(tmp_path / "out"), **fields)


def pretend_committed(config: PrepConfig) -> None:
    """Commit empty units with the recipes that the plan asks for."""
    plan = make_plan(config)
    write_manifest(plan)
    for unit, recipe in plan.recipes.items():
        with LayerWriter(Path(config.output), unit, recipe, {}) as writer:
            writer.commit()


@given(MEMBERS, MEMBERS, st.integers(1, 7))
def test_new_samples_fill_new_shards_and_old_ones_stay(old, more, size):
    first = assign_shards(old, {}, size)
    placed = {key: place for place, keys in first.items() for key in keys}
    assert sorted(placed) == sorted(old)
    assert all(place[0] == old[key] for key, place in placed.items())
    assert all(keys == sorted(keys) and len(keys) <= size for keys in first.values())
    second = assign_shards(more | old, placed, size)
    assert {place: keys for place, keys in second.items() if place in first} == first
    assert sorted(key for keys in second.values() for key in keys) == sorted(more | old)


@given(MEMBERS, st.integers(1, 7), st.randoms())
def test_membership_does_not_depend_on_the_order_of_the_sources(buckets, size, random):
    items = list(buckets.items())
    random.shuffle(items)
    assert assign_shards(dict(items), {}, size) == assign_shards(buckets, {}, size)


def test_samples_that_left_their_bucket_or_the_folder_leave_their_shard():
    previous = {"1": ("a", 0), "2": ("a", 0), "3": ("a", 1), "gone": ("a", 2)}
    shards = assign_shards({"1": "a", "2": "b", "3": "a", "4": "a"}, previous, 4)
    assert shards == {("a", 0): ["1"], ("a", 1): ["3"], ("b", 0): ["2"], ("a", 3): ["4"]}


def test_the_first_plan_wants_every_layer_of_every_shard(tmp_path):
    write_images(tmp_path / "source", 7)
    plan = make_plan(config(tmp_path))
    assert {unit.layer for unit in plan.missing} == {"px", "text", "t5"}
    assert len(plan.missing) == 3 * len(plan.shards) == 9
    assert plan.explain() == [f"{layer}: 3 of 3 shards: not computed yet" for layer in ("px", "text", "t5")]
    tasks = plan.tasks(("px", "text", "t5"))
    assert sorted(len(task.sources) for task in tasks) == [1, 3, 3]
    assert all(list(task.recipes) == ["px", "text", "t5"] for task in tasks)
    assert not (tmp_path / "out").exists()


def test_nothing_is_missing_when_all_is_committed(tmp_path):
    write_images(tmp_path / "source", 7)
    pretend_committed(config(tmp_path))
    plan = make_plan(config(tmp_path))
    assert plan.missing == {}
    assert plan.explain() == ["nothing to compute: every layer of every shard is current"]


def test_a_change_reaches_exactly_what_depends_on_it(tmp_path):
    write_images(tmp_path / "source", 7)
    pretend_committed(config(tmp_path))

    (tmp_path / "source" / "image-004.txt").write_text("Another caption.")
    plan = make_plan(config(tmp_path))
    key = next(key for key, source in plan.sources.items() if source.name == "image-004.png")
    (place,) = [place for place, keys in plan.shards.items() if key in keys]
    assert plan.missing == {
        Unit(*place, "text"): "changed: captions",
        Unit(*place, "t5"): "changed: text layer",
    }
    (tmp_path / "source" / "image-004.txt").write_text("Picture number 4.")
    assert make_plan(config(tmp_path)).missing == {}

    plan = make_plan(config(tmp_path, t5={"max_tokens": 99}))
    assert set(plan.missing.values()) == {"changed: encoder.max_tokens"}
    assert {unit.layer for unit in plan.missing} == {"t5"}

    plan = make_plan(config(tmp_path, layers=["text", "pose"]))
    assert {unit.layer for unit in plan.missing} == {"pose"}

    # batch sizes, shard size of new shards, split and paths are not part of any recipe
    other = {"shard_size": 2, "seed": 9, "holdout": 0.5, "workers": 1, "t5": {"batch_size": 3}}
    assert make_plan(config(tmp_path, **other)).missing == {}


@pytest.mark.parametrize("layer", ["px", "text", "t5", "dino", "pose"])
def test_p15_another_version_of_a_layers_code_redoes_it_and_what_depends_on_it(tmp_path, monkeypatch, layer):
    write_images(tmp_path / "source", 4)
    settings = config(tmp_path, layers=["text", "dino", "pose"])
    pretend_committed(settings)
    monkeypatch.setitem(LAYERS, layer, replace(LAYERS[layer], code=LAYERS[layer].code + 1))
    plan = make_plan(settings)
    depending = {"px": {"text", "t5", "dino", "pose"}, "text": {"t5"}}.get(layer, set())
    assert {unit.layer for unit in plan.missing} == {layer} | depending
    assert f"{layer}: 2 of 2 shards: changed: code" in plan.explain()
    assert ("t5: 2 of 2 shards: changed: text layer" in plan.explain()) == ("t5" in depending)


def test_p15_other_buckets_make_other_shards_and_nothing_is_mixed(tmp_path):
    write_images(tmp_path / "source", 4, size=(200, 160))
    pretend_committed(config(tmp_path))
    plan = make_plan(config(tmp_path, base=128))
    assert set(plan.missing.values()) == {"not computed yet"}
    assert {bucket for bucket, _ in plan.shards} == {"152x104"}
    assert {bucket for bucket, _ in make_plan(config(tmp_path)).shards} == {"80x56"}


def test_p15_what_is_of_another_recipe_is_not_published(tmp_path):
    write_images(tmp_path / "source", 4)
    pretend_committed(config(tmp_path))
    current_parts(make_plan(config(tmp_path)))
    with pytest.raises(DataError, match=r"shard-000000.t5.tar was not computed"):
        current_parts(make_plan(config(tmp_path, t5={"max_tokens": 99})))


def test_a_lost_or_damaged_unit_is_missing(tmp_path):
    write_images(tmp_path / "source", 3)
    pretend_committed(config(tmp_path))
    (bucket, shard), _ = make_plan(config(tmp_path)).shards.popitem()
    (tmp_path / "out" / Unit(bucket, shard, "text").tar).unlink()
    (tmp_path / "out" / Unit(bucket, shard, "t5").part).unlink()
    assert make_plan(config(tmp_path)).missing == {
        Unit(bucket, shard, "text"): "its tar or index part is damaged",
        Unit(bucket, shard, "t5"): "not computed yet",
    }


def test_the_manifest_lists_every_sample_with_its_place(tmp_path):
    write_images(tmp_path / "source", 7)
    plan = make_plan(config(tmp_path))
    (tmp_path / "out").mkdir()
    write_manifest(plan)
    places = {row["key"]: (row["bucket"], row["shard"]) for row in read_manifest(tmp_path / "out").to_pylist()}
    assert places == {key: place for place, keys in plan.shards.items() for key in keys}
    (tmp_path / "out" / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged"):
        make_plan(config(tmp_path))


def test_images_that_would_be_enlarged_too_much_are_refused(tmp_path):
    write_images(tmp_path / "source", 1, size=(48, 48))  # exactly 4/3
    write_images(tmp_path / "source", 1, size=(47, 47), first=1)
    write_images(tmp_path / "source", 1, size=(1, 20_000), first=2)  # a strip, refused from its header
    plan = make_plan(config(tmp_path))
    assert [source.name for source in plan.sources.values()] == ["image-000.png"]
    assert {(reject.source, reject.reason) for reject in plan.rejects} == {
        ("image-001.png", "too_small"),
        ("image-002.png", "too_small"),
    }
    assert len(make_plan(config(tmp_path, image={"max_upscale": 2.0})).sources) == 2


def test_p04_unusable_captions_stop_the_run_with_their_count(tmp_path):
    source = tmp_path / "source"
    write_images(source, 8)
    (source / "image-000.txt").unlink()
    (source / "image-001.txt").write_bytes(b"")
    (source / "image-002.txt").write_bytes(b"caf\xe9")
    (source / "image-003.txt").write_bytes(b"a\0b")
    (source / "image-004.txt").write_text("\ufeff" + "many words " * 5000)  # long, with a byte order mark: a caption
    with pytest.raises(DataError) as error:
        make_plan(config(tmp_path))
    for word in ("4 of 8 images", "1 caption_missing", "1 caption_nul", "image-000.txt", "captions.on_missing=reject"):
        assert word in str(error.value)
    assert len(make_plan(config(tmp_path, captions={"on_missing": "reject"})).sources) == 8
    assert len(make_plan(config(tmp_path, layers=["pose"])).sources) == 8  # no text, no need for captions


def test_the_output_may_not_lie_in_the_source_nor_the_source_in_the_output(tmp_path):
    write_images(tmp_path / "source", 1)
    for output in ("source", "source/out", "."):
        with pytest.raises(ConfigError, match="must not lie inside"):
            make_plan(config(tmp_path).model_copy(update={"output": str(tmp_path / output)}))


def test_every_layer_has_members(tmp_path):
    write_images(tmp_path / "source", 1)
    recipes = make_plan(config(tmp_path, layers=["text", "dino", "pose"])).recipes
    assert {unit.layer for unit in recipes} == set(LAYERS)


@pytest.mark.parametrize("layers", [["text"], ["dino"]])
def test_of_byte_equal_copies_the_captioned_one_is_kept(tmp_path, layers):
    write_images(tmp_path / "source", 1)
    image = tmp_path / "source" / "image-000.png"
    copy = tmp_path / "source" / "A.png"
    copy.write_bytes(image.read_bytes())
    (tmp_path / "source" / "A.txt").write_text("\u200b")  # no caption that can be used
    plan = make_plan(config(tmp_path, layers=layers, captions={"on_missing": "reject"}))
    (source,) = plan.sources.values()
    assert source.name == ("image-000.png" if layers == ["text"] else "A.png")
    assert [(reject.source, reject.reason) for reject in plan.rejects] == [
        ("A.png" if layers == ["text"] else "image-000.png", "duplicate")
    ]
    copy.with_suffix(".txt").write_text("Both have one: the first name is kept.")
    assert [source.name for source in make_plan(config(tmp_path, layers=layers)).sources.values()] == ["A.png"]

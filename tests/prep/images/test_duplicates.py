"""Near duplicates and the split: by content, groups on one side, and never changing once published."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prep.config import PrepConfig
from prep.dataset.holdout import COLUMN
from prep.dataset.layout import Unit, read_part
from prep.dataset.reader import Dataset
from prep.encoders.demo import ASSETS, DETECTOR, POSE
from prep.figures.figures import draw_figure
from prep.images import duplicates
from prep.images.duplicates import (
    CLS_COSINE,
    OFF,
    DisjointSets,
    assign_splits,
    duplicate_groups,
    holdout_size,
    near_pairs,
    perceptual_hash,
    thumbnail,
    thumbnail_rows,
)
from prep.passes import split
from prep.passes.advice import Advice, advise, warn
from prep.passes.layers import LayerWorker
from prep.passes.plan import make_plan, write_manifest
from prep.passes.publish import publish
from prep.passes.split import cls_cosine
from prep.run import current_parts
from tests.prep.images.test_cosine import near_labels

KEYS = st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), min_size=1, max_size=60, unique=True)


def photograph(seed: int, side: int = 256) -> np.ndarray:
    """Smooth random colours with some detail: neighbouring frequencies as in a photograph."""
    generator = np.random.default_rng(seed)
    layers = [
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((side, side), 3)
        for size in (3, 6, 12, 24)
    ]
    weights = np.array([0.5, 0.25, 0.15, 0.1])
    return sum(w * np.asarray(layer, float) for w, layer in zip(weights, layers)).astype(np.uint8)


def groups_of(pictures: list[np.ndarray]) -> dict[str, str]:
    keys = [f"{number:04x}" for number in range(len(pictures))]
    return duplicate_groups(keys, [perceptual_hash(p) for p in pictures], [thumbnail(p) for p in pictures])


def edited(pixels: np.ndarray, edit: str) -> np.ndarray:
    image = Image.fromarray(pixels)
    if edit == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=50)
        return np.asarray(Image.open(buffer))
    if edit == "half the size":
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))
    return np.clip(pixels.astype(int) + 1, 0, 255).astype(np.uint8)  # a little brighter


@pytest.mark.parametrize("edit", ["jpeg", "half the size", "brighter"])
def test_edited_copies_are_grouped_and_other_pictures_are_not(edit):
    originals = [photograph(seed) for seed in range(12)]
    groups = groups_of(originals + [edited(pixels, edit) for pixels in originals])
    assert [groups[f"{number:04x}"] for number in range(12, 24)] == [f"{number:04x}" for number in range(12)]
    assert len(set(groups.values())) == 12


def test_different_figures_on_one_background_are_not_duplicates():
    pictures = [np.asarray(draw_figure(1, index, 64).image.resize((64, 64))) for index in range(150)]
    assert len(set(groups_of(pictures).values())) == len(pictures)


def test_groups_are_transitive_and_named_after_their_smallest_key():
    base = photograph(0)
    chain = [np.clip(base.astype(int) + step, 0, 255).astype(np.uint8) for step in (0, 2, 4)]
    groups = duplicate_groups(["c", "b", "a"], [perceptual_hash(p) for p in chain], [thumbnail(p) for p in chain])
    assert groups == {"a": "a", "b": "a", "c": "a"}
    assert duplicate_groups([], [], []) == {}


def test_many_equal_pictures_are_one_group():
    assert len(set(groups_of([np.zeros((64, 64, 3), np.uint8)] * 300).values())) == 1


@pytest.mark.parametrize("compared", [1 << 22, 5])
@pytest.mark.parametrize("measured", [1 << 14, 2])
def test_pairs_are_those_of_the_definition_in_tiles_of_any_size(monkeypatch, compared, measured):
    monkeypatch.setattr(duplicates, "COMPARED", compared)
    monkeypatch.setattr(duplicates, "MEASURED", measured)
    generator = np.random.default_rng(1)
    centres = generator.integers(0, 1 << 63, 4, dtype=np.uint64)
    flips = np.uint64(1) << generator.integers(0, 64, (80, 3), dtype=np.uint64)  # so that some differ in five bits
    bits = centres[generator.integers(0, 4, 80)] ^ np.bitwise_xor.reduce(flips, axis=1)
    small = (generator.integers(0, 3, (80, 1)) * 3 + generator.integers(100, 104, (80, 768))).astype(np.uint8)
    hashes, thumbnails = [f"{value:016x}" for value in bits.tolist()], [row.tobytes() for row in small]
    wanted = {
        (a, b)
        for a in range(80)
        for b in range(a + 1, 80)
        if (int(bits[a]) ^ int(bits[b])).bit_count() <= 4
        and np.abs(small[a].astype(int) - small[b].astype(int)).mean() <= duplicates.MAX_DIFFERENCE
    }
    assert 20 < len(wanted) < 80 * 79 / 2
    columns = [thumbnails, small, thumbnail_rows(pa.chunked_array([thumbnails[:30], thumbnails[30:]]).slice(0))]
    for column in columns:
        assert {(a, b) for block in near_pairs(hashes, column) for a, b in block.tolist()} == wanted
    one_by_one, at_once = DisjointSets(80), DisjointSets(80)
    at_once.join(3, 7)
    for pair in [(3, 7), *wanted]:
        one_by_one.join(*pair)
    at_once.join_all(np.array(sorted(wanted)))
    same = [groups.roots()[:, None] == groups.roots() for groups in (one_by_one, at_once)]
    assert (same[0] == same[1]).all()


def test_thumbnails_of_a_column_are_those_of_its_rows():
    rows = [bytes([number]) * 768 for number in range(5)]
    for column in (
        pa.chunked_array([rows]),
        pa.chunked_array([rows[:2], [], rows[2:]]),
        pa.chunked_array([rows]).slice(1),
    ):
        assert [row.tobytes() for row in thumbnail_rows(column)] == column.to_pylist()
    assert thumbnail_rows(pa.chunked_array([], pa.binary())).shape == (0, 768)


def test_either_kind_of_likeness_makes_a_group():
    pictures = [photograph(0), photograph(0), photograph(1), photograph(2)]
    tokens = np.eye(4, 300, dtype=np.float32)
    tokens[2] = tokens[1]
    hashes, small = [perceptual_hash(p) for p in pictures], [thumbnail(p) for p in pictures]
    alike = near_labels(tokens, 0.98)
    assert duplicate_groups(list("abcd"), hashes, small, alike) == {
        "a": "a",
        "b": "a",
        "c": "a",
        "d": "d",
    }
    assert duplicate_groups(list("abcd"), hashes, small) == {"a": "a", "b": "a", "c": "c", "d": "d"}


def test_class_tokens_count_for_production_encoders_alone_unless_asked_for():
    def threshold(**fields) -> float:
        return cls_cosine(PrepConfig(source="a", output="b", **fields))

    assert threshold() == CLS_COSINE["production"] < OFF == threshold(encoders="demo")
    assert threshold(encoders="demo", duplicates={"cls_cosine": 0.9}) == 0.9
    assert threshold(duplicates={"cls_cosine": 1.0}) == threshold(layers=["pose"]) == OFF


# --- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size"), [(1, 0), (4, 0), (5, 1), (100, 20), (320, 64), (2500, 64), (3200, 64), (10_000, 200)]
)
def test_the_size_of_the_holdout(count, size):
    assert holdout_size(count, 0.02, 64) == size


@given(KEYS, st.integers(0, 5))
def test_trap_10_the_split_follows_the_content_not_the_order(keys, seed):
    alone = {key: key for key in keys}
    split = assign_splits(alone, {}, seed, 0.02, 64).sides
    assert split == assign_splits(dict(reversed(alone.items())), {}, seed, 0.02, 64).sides  # trap 10
    assert sum(side == "holdout" for side in split.values()) == holdout_size(len(keys), 0.02, 64)


def test_trap_10_the_holdout_is_not_the_first_keys():
    keys = [f"{number:08x}" for number in range(1000)]
    split = assign_splits({key: key for key in keys}, {}, 0, 0.02, 64).sides
    held = [number for number, key in enumerate(keys) if split[key] == "holdout"]
    assert 350 < np.mean(held) < 650  # trap 10
    other = assign_splits({key: key for key in keys}, {}, 1, 0.02, 64).sides
    assert other != split


@given(KEYS, st.data())
def test_trap_10_groups_lie_on_one_side_and_published_keys_stay(keys, data):
    groups = {key: min([*keys[: 1 + index % 3], key]) for index, key in enumerate(keys)}
    first = assign_splits({key: groups[key] for key in keys[: len(keys) // 2]}, {}, 0, 0.1, 10).sides
    split = assign_splits(groups, first, 0, 0.1, 10)
    assert {key: split.sides[key] for key in first} == first
    assert set(split.sides) | set(split.linking) == set(keys)
    new_sides = {(groups[key], split.sides[key]) for key in keys if key in split.sides and key not in first}
    assert len({group for group, _ in new_sides}) == len(new_sides)  # trap 10
    old_sides = {(groups[key], side) for key, side in first.items()}
    for group, side in new_sides:
        assert {old for name, old in old_sides if name == group} <= {side}


def test_a_new_sample_that_would_link_both_sides_is_left_out():
    published = {"a": "train", "b": "holdout", "x": "train"}
    split = assign_splits({"a": "a", "b": "a", "new": "a", "x": "x", "y": "x"}, published, 0, 0.5, 0)
    assert split.linking == ["new"]
    assert split.sides == {**published, "y": "train"}


@given(KEYS, st.data())
def test_groups_do_not_depend_on_the_order(keys, data):
    pictures = data.draw(st.lists(st.integers(0, 4), min_size=len(keys), max_size=len(keys)))
    kinds = [PICTURES[number] for number in pictures]
    tokens = np.eye(5, 64)[[number // 2 for number in pictures]]
    order = data.draw(st.permutations(range(len(keys))))

    def groups(indices):
        hashes, small = ([kinds[index][part] for index in indices] for part in (0, 1))
        return duplicate_groups(
            [keys[index] for index in indices], hashes, small, near_labels(tokens[list(indices)], 0.98)
        )

    first = groups(range(len(keys)))
    assert first == groups(order)
    split = assign_splits(first, {}, 0, 0.2, 5)
    assert split == assign_splits(groups(order), {}, 0, 0.2, 5)
    assert len({(first[key], side) for key, side in split.sides.items()}) == len(set(first.values()))


@given(KEYS, st.data())
def test_trap_10_whatever_is_added_or_lost_published_keys_never_move_and_nothing_leaks(keys, data):
    """Several publications, each with other samples and other groups."""
    published: dict[str, str] = {}
    for round_ in range(3):
        chosen = data.draw(st.lists(st.sampled_from(keys), min_size=1, unique=True), label=f"keys {round_}")
        numbers = data.draw(st.lists(st.integers(0, 6), min_size=len(chosen), max_size=len(chosen)))
        names = {number: min(key for key, n in zip(chosen, numbers) if n == number) for number in numbers}
        groups = {key: names[number] for key, number in zip(chosen, numbers)}
        split = assign_splits(groups, published, 0, 0.3, 2)
        assert {key: side for key, side in split.sides.items() if key in published} == {
            key: published[key] for key in chosen if key in published
        }  # trap 10
        assert set(split.sides).isdisjoint(split.linking)
        assert set(split.sides) | set(split.linking) == set(chosen)
        for name in names.values():
            sides = {split.sides[key] for key in groups if groups[key] == name and key in split.sides}
            old = {published[key] for key in groups if groups[key] == name and key in published}
            assert sides <= old if old else len(sides) == 1
            rejected = {key for key in split.linking if groups[key] == name}
            assert bool(rejected) <= (len(old) == 2)
            assert len(old) < 2 or rejected == {key for key in groups if groups[key] == name and key not in published}
        published = split.sides


PICTURES = [(perceptual_hash(photograph(seed)), thumbnail(photograph(seed))) for seed in range(5)]


# --- leaks (P05) ------------------------------------------------------------------------------------------------------


def leaks(dataset: Dataset, threshold: float) -> tuple[int, int]:
    """How many near duplicates of either kind lie on one side, and how many on both, counted from what is on disk."""
    rows = dataset.rows()
    parts = [read_part(dataset.root, Unit(*place, "px")) for place in {(row["bucket"], row["shard"]) for row in rows}]
    small = {
        key: data for part in parts for key, data in zip(*(part.table[n].to_pylist() for n in ("key", "thumbnail")))
    }
    found = near_pairs([row["phash"] for row in rows], [small[row["key"]] for row in rows])
    pairs = {(a, b) for block in found for a, b in block.tolist()}
    tokens = np.stack([dataset.cls(row) for row in rows]).astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    pairs |= {(int(a), int(b)) for a, b in np.argwhere(tokens @ tokens.T > threshold) if a < b}
    across = [pair for pair in pairs if rows[pair[0]]["split"] != rows[pair[1]]["split"]]
    return len(pairs) - len(across), len(across)


def prepare(config: PrepConfig) -> Dataset:
    plan = make_plan(config)
    write_manifest(plan)
    worker = LayerWorker(config)
    for task in plan.tasks(config.active_layers):
        worker.run(task)
    publish(plan, current_parts(plan), "runs/rejects.parquet")
    return Dataset(config.output)


@pytest.mark.slow
def test_p05_duplicates_stay_on_one_side_and_nothing_leaks(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for seed in range(20):
        Image.fromarray(photograph(seed, 128)).save(source / f"{seed:02d}.png")
        if seed % 2:
            Image.fromarray(edited(photograph(seed, 128), "jpeg")).save(source / f"{seed:02d}-jpeg.png")
    (source / "99-exact.png").write_bytes((source / "00.png").read_bytes())
    fields = {"base": 64, "encoders": "demo", "layers": ["dino"], "holdout": 0.4, "shard_size": 8}
    alone = prepare(PrepConfig(source=str(source), output=str(tmp_path / "by-hash"), **fields))
    tokens = {row["source"]: alone.cls(row) for row in alone.rows()}
    originals = np.stack([tokens[f"{seed:02d}.png"] for seed in range(20)]).astype(np.float64)
    originals /= np.linalg.norm(originals, axis=1, keepdims=True)
    cosines = np.sort((originals @ originals.T)[np.triu_indices(20, 1)])
    threshold = float(cosines[-8:-6].mean())  # at which seven pairs look alike to the tokens and not to the hash
    assert leaks(alone, threshold)[1] > 0

    output = str(tmp_path / "out")
    config = PrepConfig(source=str(source), output=output, duplicates={"cls_cosine": threshold}, **fields)
    first = prepare(config)
    counts = first.info["counts"]
    assert (counts["samples"], counts["rejects"]) == (30, 1)
    assert 0 < counts["holdout"] <= 12
    assert first.info["stages"]["split"]["cls_cosine"] == threshold
    together, across = leaks(first, threshold)
    assert (together >= 17, across) == (True, 0)
    sides = {row["source"]: row["split"] for row in first.rows()}

    # copies of some of either side, half the size: each goes to its original's
    for seed in range(0, 20, 2):
        copy = Image.fromarray(photograph(seed, 128)).resize((96, 96), Image.Resampling.LANCZOS)
        copy.save(source / f"{seed:02d}-half.png")
    second = prepare(config)
    new = {row["source"]: row["split"] for row in second.rows()}
    assert {name: new[name] for name in sides} == sides  # trap 10
    assert leaks(second, threshold)[1] == 0
    assert leaks(second, threshold)[0] >= 20


def test_p05_a_new_image_between_both_sides_is_refused(tmp_path, monkeypatch):
    """Two pictures that are no duplicates of each other, one held out, and then one that is a duplicate of both."""
    (tmp_path / "source").mkdir()

    def add(name: str, brightness: int, seed: int = 0) -> None:
        pixels = np.clip(photograph(seed, 128).astype(int) + brightness, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "source" / name)

    networks = {"detector": str(ASSETS / DETECTOR), "pose": str(ASSETS / POSE)}
    config = PrepConfig(
        source=str(tmp_path / "source"),
        output=str(tmp_path / "out"),
        base=64,
        layers=["pose"],
        pose=networks,
        holdout=0.5,
    )
    add("a.png", 0)
    add("b.png", 5)
    with monkeypatch.context() as patch:  # published before it was known what is the other one a little brighter
        patch.setattr(split, "altered_pairs", lambda *given: np.empty((0, 2), np.int64))
        first = {row["source"]: (row["split"], row["duplicate_group"]) for row in prepare(config).rows()}
    assert {side for side, _ in first.values()} == {"train", "holdout"}
    add("between.png", 2)
    add("other.png", 0, seed=1)
    second = {row["source"]: (row["split"], row["duplicate_group"]) for row in prepare(config).rows()}
    assert second.keys() == {"a.png", "b.png", "other.png"}
    assert first.items() <= second.items()  # trap 10
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert (reject["source"], reject["stage"], reject["reason"]) == ("between.png", "split", "links_splits")


def test_groups_that_were_published_on_both_sides_and_large_ones_are_warned_of():
    def warnings(groups: str, sides: str) -> list[str]:
        names = {"t": "train", "h": "holdout"}
        table = pa.table({"duplicate_group": list(groups), "split": [names[side] for side in sides]})
        return [line for line in warn(table, {}) if "training images are few" not in line]

    assert warnings("abcd", "tthh") == []
    (torn,) = warnings("a" + "a" + "".join(map(chr, range(1000, 1200))), "th" + "t" * 200)
    assert torn.startswith("1 groups of near duplicates lie on both sides")
    (large,) = warnings("aaa" + "".join(map(chr, range(1000, 1200))), "ttt" + "h" * 200)
    assert large == "3 of 203 samples are near duplicates of each other (group a)"
    (large,) = warnings("aaabb" + "".join(map(chr, range(1000, 1200))), "ttttt" + "h" * 200)
    assert large.endswith("(group a, the largest of 2 groups with 5 samples)")


def test_large_groups_are_held_out_as_often_as_single_images():
    groups = {f"{group:03d}{member:02d}": f"{group:03d}" for group in range(50) for member in range(10)}
    groups |= {f"{single:05d}": f"{single:05d}" for single in range(60_000, 60_500)}
    held = 0
    for seed in range(20):
        sides = assign_splits(groups, {}, seed, 0.2, 0).sides
        held += sum(sides[key] == "holdout" for key in groups if key < "6")
    assert 0.15 <= held / (20 * 500) <= 0.25


def test_a_holdout_that_cannot_be_divided_is_warned_of():
    def advice(held: list[str], trained: int) -> list[Advice]:
        parts, groups = [*held, *[None] * trained], list(map(str, range(len(held) + trained)))
        sides = ["train" if part is None else "holdout" for part in parts]
        table = pa.table({"duplicate_group": groups, "split": sides, COLUMN: pa.array(parts, pa.string())})
        return [one for one in advise(table, {}) if "training images are few" not in one.words]

    assert advice(["test", "dev"], 2) == []
    (one,) = advice(["test", "test"], 2)
    assert one.words.startswith(
        "the holdout is 2 images that show the same: all of it is test, and nothing is left for"
    )
    assert "left for validation and sweeps. Of images that come" in one.words
    assert one.command.endswith("source=FOLDER_WITH_MORE"), "no minimum holds out more than a fifth"
    (one,) = advice(["dev"], 9)
    assert one.words.startswith("the holdout is a single image: all of it is dev, and nothing is left for what is")
    assert one.command.startswith("rm DATASET/index.parquet && ")  # a published sample stays where it is
    assert one.command.endswith(" holdout_min=2")


def test_a_set_that_is_learnt_by_heart_is_warned_of():
    def warnings(training: int) -> list[str]:
        groups = list(map(str, range(training + 1)))
        return warn(pa.table({"duplicate_group": groups, "split": ["train"] * training + ["holdout"]}), {})

    (line,) = warnings(24)
    assert line.startswith("24 training images are few")
    assert "--init-from" in line
    assert warnings(1000) == []

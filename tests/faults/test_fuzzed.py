"""What others wrote, at random: whatever stands in a config, a dataset, a checkpoint or an answer, errors are ours.

A hash proves that a file is the one that was written, not that its writer meant well: these files are mutated and then
vouched for, as their author can. Each read ends within bounds of time and memory, with a result, or with an error of
exit code 2 or 3. The suite tries a few; ``NANODIT_FUZZ=20000 python -m pytest tests/faults/test_fuzzed.py`` as many as
that, each. What broke once is an ``@example``, or a case of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nanodit.config import Config, find_config, load_config, walk_keys
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, sha256_bytes
from nanodit.storage import open_storage
from prep.captions.quality import Answer, CaptionRules, find_flaw, next_step, tidy
from prep.config import PrepConfig
from prep.dataset.codecs import decode_pixels, load_npy, npy_bytes, webp_bytes
from prep.dataset.layout import Unit, parquet_bytes, read_members, read_parquet, read_part
from prep.dataset.reader import Dataset
from prep.verify.units import check_unit
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main as train
from train.checkpoint.checkpoint import checkpoint_steps
from train.checkpoint.open import load_model
from train.checkpoint.posthoc import list_snapshots
from train.checkpoint.provenance import dataset_summary, environment
from train.checkpoint.resume import check_same_run, choose_checkpoint
from train.config import TrainConfig
from train.model.modalities import Features
from train.sweep.config import SweepConfig

EXAMPLES = int(os.environ.get("NANODIT_FUZZ", "25"))
FEW = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SECONDS, BYTES = 10.0, 1 << 30  # of the processor and of memory, for one small file

OURS = (ConfigError, DataError)


@contextmanager
def bounded(*allowed: type[Exception]) -> Iterator[None]:
    """Let only these errors come, within the bounds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    start = time.process_time()
    try:
        yield
    except allowed:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < SECONDS


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Replace a few stretches of a file by other bytes, some of them by none."""
    places = draw(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 16), st.binary(max_size=16)), min_size=1, max_size=4)
    )

    def edit(data: bytes) -> bytes:
        for place, length, new in places:
            start = round(place * len(data))
            data = data[:start] + new + data[start + length :]
        return data

    return edit


NUMBERS = st.sampled_from([0, 1, -1, 7, 1 << 16, 1 << 31, 1 << 40, 1 << 63, 10**30, -(10**9), 0.5, -0.0, 1e308])
WORDS = st.text(max_size=8) | st.sampled_from(
    ["", "..", "/", "64x64", "px", "px.webp", "999999x999999", "\x00", "0" * 64]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Replace a value somewhere in a tree of JSON by another, take it out, or give it another name."""
    choices = draw(st.lists(st.integers(0, 1 << 16), min_size=1, max_size=6))
    new, what = draw(VALUES), draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))

    def change(tree: Any) -> Any:
        top = {"": json.loads(json.dumps(tree))}
        node, key = top, ""
        for choice in choices:
            inside = node[key]
            if not isinstance(inside, dict | list) or not inside:
                break
            node, key = inside, [*(inside if isinstance(inside, dict) else range(len(inside)))][choice % len(inside)]
        if what == "remove" and node is not top:
            del node[key]
        elif what == "rename" and isinstance(node, dict) and node is not top:
            node[str(new)] = node.pop(key)
        else:
            node[key] = new
        return top[""]

    return change


# --- configs ----------------------------------------------------------------------------------------------------------

CONFIGS = {"prep/base": PrepConfig, "train/base": TrainConfig, "train/seed": TrainConfig, "sweep/quick": SweepConfig}


@FEW
@given(st.sampled_from(list(CONFIGS)), edits())
def test_any_config_file_is_read_or_refused(tmp_path_factory, name, edit):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(edit(find_config(f"configs/{name}.yaml").read_bytes()))
    with bounded(ConfigError):
        load_config(CONFIGS[name], file)


KEYS: list[tuple[type[Config], str]] = [(model, key) for model in set(CONFIGS.values()) for key in walk_keys(model)]
SNIPPETS = st.sampled_from(
    ["[", "]", "{", "}", ": ", "&a ", "*a", "- ", "!!", "|\n", "'", '"', "1e9", ".inf", "null", "\n", "~"]
)


@FEW
@given(
    st.sampled_from(KEYS), st.sampled_from(["", ".", ".x", "."]), st.lists(SNIPPETS | st.text(max_size=5)).map("".join)
)
def test_any_override_is_taken_or_refused(key, more, value):
    model, dotted = key
    with bounded(ConfigError):
        load_config(model, None, [f"{dotted}{more}={value}"])


@FEW
@given(st.text())
@example(")=")  # its path was empty, like that of the next
@example("train-steps=3")
def test_any_text_is_an_override_or_none(text):
    with bounded(ConfigError):
        load_config(TrainConfig, None, [text])


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = write_dataset(tmp_path_factory.mktemp("fuzzed") / "dataset")
    use(root)
    return root


def use(root: Path) -> None:
    """Read what training, evaluation and the reports read."""
    opened = Dataset(root)
    Features.from_dataset(dataset_summary(opened.info))
    for row in (*opened.rows()[:2], *opened.rows("holdout")[:1]):
        dict(row)
        opened.pixels(row)
        opened.flippable(row)
        for layer, read in (("t5", opened.t5), ("dino", opened.cls), ("dino", opened.patches), ("pose", opened.pose)):
            if layer in opened.layers:
                read(row)


def edited(change: Callable[[Any], Any] | Callable[[bytes], bytes], data: bytes) -> bytes:
    """A JSON file after a change of its tree, or of its bytes."""
    return change(data) if change.__name__ == "edit" else json.dumps(change(json.loads(data))).encode()


@contextmanager
def instead(files: dict[Path, bytes]) -> Iterator[None]:
    """Let files have another content for a while."""
    before = {file: file.read_bytes() for file in files}
    try:
        for file, data in files.items():
            file.write_bytes(data)
        yield
    finally:
        for file, data in before.items():
            file.write_bytes(data)


@FEW
@given(changes() | edits())
def test_any_dataset_json_is_read_or_refused(dataset, change):
    file = dataset / "dataset.json"
    with instead({file: edited(change, file.read_bytes())}), bounded(DataError):
        use(dataset)


def vouched(root: Path, index: bytes) -> dict[Path, bytes]:
    """An index and the dataset.json that names it."""
    info = json.loads((root / "dataset.json").read_bytes())
    info["hashes"]["index.parquet"] = sha256_bytes(index)
    return {root / "index.parquet": index, root / "dataset.json": canonical_json(info).encode()}


@FEW
@given(edits())
def test_any_index_is_read_or_refused(dataset, edit):
    with instead(vouched(dataset, edit((dataset / "index.parquet").read_bytes()))), bounded(DataError):
        use(dataset)


CELLS = st.one_of(
    st.none(), st.integers(-(1 << 63), (1 << 63) - 1), st.sampled_from([0, 1, 1 << 20, 1 << 31, 1 << 40]), st.floats(),
    st.booleans(), WORDS, st.binary(max_size=8), st.lists(st.integers(0, 9), max_size=3),
)  # fmt: skip


@FEW
@given(st.integers(0, 1 << 16), CELLS, st.sampled_from(["one", "all", "drop", "twice", "empty"]))
def test_any_columns_of_an_index_are_read_or_refused(dataset, number, cell, what):
    table = read_parquet((dataset / "index.parquet").read_bytes())
    place = number % table.num_columns
    name, values = table.column_names[place], table[table.column_names[place]].to_pylist()
    if what == "one":
        values[0] = cell
        try:
            table = table.set_column(place, name, pa.array(values, table.schema.field(place).type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return
    elif what == "all":
        table = table.set_column(place, name, pa.array([cell] * len(values)))
    elif what == "drop":
        table = table.drop_columns([name])
    elif what == "twice":
        table = table.append_column(name, table[name])
    else:
        table = table.slice(0, 0)
    with instead(vouched(dataset, parquet_bytes(table))), bounded(DataError):
        use(dataset)


@FEW
@given(edits())
def test_any_array_is_read_or_refused(edit):
    with bounded(ValueError, EOFError):  # which readers name the sample in
        assert isinstance(load_npy(edit(npy_bytes(np.ones((3, 4), np.float16)))), np.ndarray)


@FEW
@given(edits())
def test_any_picture_is_decoded_or_refused(edit):
    square = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    with bounded(ValueError, OSError):  # which readers name the sample in
        assert decode_pixels(edit(webp_bytes(square)), (64, 64)).shape == square.shape


@FEW
@given(edits(), changes())
def test_any_index_part_is_read_or_computed_again(dataset, tmp_path_factory, edit, change):
    """Of a unit in a folder of its own; the record is changed as a tree."""
    root = tmp_path_factory.getbasetemp() / "unit"
    unit = Unit("64x64", 0, "dino")
    for name in (unit.tar, unit.part):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((dataset / name).read_bytes())
    part = (root / unit.part).read_bytes()
    table = read_parquet(part)
    record = change(json.loads(table.schema.metadata[b"nanodit"]))
    metadata = {b"nanodit": json.dumps(record).encode()}
    for data in (edit(part), parquet_bytes(table.replace_schema_metadata(metadata))):
        (root / unit.part).write_bytes(data)
        with bounded(DataError):
            check_unit(open_storage(root), unit)
            if (found := read_part(root, unit)) is not None:
                hash(found.fingerprint)
                list(read_members(open_storage(root), found, "cls.npy"))


# --- checkpoints ------------------------------------------------------------------------------------------------------


RUN = ["train.steps=8", "ema.snapshots=8", "checkpoint.every_steps=8"]


@pytest.fixture(scope="module")
def trained(dataset) -> Path:
    """A folder with a run of eight steps, its config, and its export."""
    folder = dataset.parent
    write_config(folder / "c.yaml", dataset, folder / "run")
    assert train(["run", "--config", str(folder / "c.yaml"), *RUN]) == 0
    assert train(["export", "--checkpoint", str(folder / "run"), "--output", str(folder / "export")]) == 0
    return folder


def vouched_checkpoint(step: Path, name: str, data: bytes) -> dict[Path, bytes]:
    """A file of a checkpoint and the manifest that names it."""
    manifest = json.loads((step / "manifest.json").read_bytes())
    manifest["files"][name] = {"sha256": sha256_bytes(data), "bytes": len(data)}
    return {step / name: data, step / "manifest.json": canonical_json(manifest).encode()}


def newest(folder: Path) -> Path:
    return checkpoint_steps(folder / "run")[0]


@FEW
@given(changes() | edits())
def test_any_manifest_is_read_or_refused(trained, change):
    step = newest(trained)
    file = step / "manifest.json"
    with instead({file: edited(change, file.read_bytes())}), bounded(*OURS):
        load_model(step)


@FEW
@given(changes() | edits())
def test_any_state_is_drawn_with_or_refused(trained, change):
    step = newest(trained)
    state = edited(change, (step / "state.json").read_bytes())
    with instead(vouched_checkpoint(step, "state.json", state)), bounded(*OURS):
        load_model(step)


@FEW
@given(changes() | edits())
def test_any_state_is_continued_from_or_refused(trained, change):
    step = newest(trained)
    config = load_config(TrainConfig, trained / "c.yaml", RUN)
    state = edited(change, (step / "state.json").read_bytes())
    with instead(vouched_checkpoint(step, "state.json", state)), bounded(*OURS):
        checkpoint = choose_checkpoint(config.run_folder, "auto")
        check_same_run(checkpoint, config, Dataset(config.dataset).fingerprint, environment(torch.device("cpu")))


@FEW
@given(st.sampled_from(["model", "ema", "optimizer"]), edits())
def test_any_tensors_are_read_or_refused(trained, part, edit):
    step = newest(trained)
    tensors = edit((step / f"{part}.safetensors").read_bytes())
    with instead(vouched_checkpoint(step, f"{part}.safetensors", tensors)), bounded(*OURS):
        load_model(step, part if part == "model" else "ema")
        choose_checkpoint(trained / "run", "auto")


@FEW
@given(changes() | edits())
def test_any_record_of_a_snapshot_is_read_or_refused(trained, change):
    file = min(list_snapshots(trained / "run").values()).with_suffix(".json")
    with instead({file: edited(change, file.read_bytes())}), bounded(*OURS):
        load_model(trained / "run", "posthoc:0.1")


@FEW
@given(changes() | edits())
def test_any_description_of_an_export_is_read_or_refused(trained, change):
    file = trained / "export" / "transformer" / "config.json"
    with instead({file: edited(change, file.read_bytes())}), bounded(*OURS):
        load_model(trained / "export")


# --- captions ---------------------------------------------------------------------------------------------------------

RULES = CaptionRules(30, 300, {"num_predict": 400, "seed": 7, "temperature": 0.0}, 0.5)
PHRASES = st.sampled_from(
    [
        "<think>", "</think>", '"', "“", "I'm sorry", "here is a", "description:", "# ", "- ", "```", "{", "a man ",
        "\n", "\ud800",
    ]
)  # fmt: skip


@FEW
@given(st.lists(PHRASES | st.text(max_size=20), max_size=40).map("".join), st.sampled_from(["stop", "length", None]))
@example('"' * 100_000, "stop")
@example("here is " * 20_000, None)
@example("i" + "-'" * 50_000, "stop")
def test_any_answer_is_a_caption_or_has_a_flaw(text, end):
    with bounded():
        tidied = tidy(text)
        assert tidy(tidied) == tidied
        answer = Answer(tidied, end, RULES.options)
        assert find_flaw(answer, RULES) == find_flaw(Answer(tidy(answer.text), end, RULES.options), RULES)
        next_step([answer] * 4, RULES)

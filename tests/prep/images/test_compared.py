"""What was found about class tokens is written down: it saves work, and never changes a group."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodit.errors import DataError
from nanodit.files import sha256_bytes
from nanodit.storage import LocalFolder, open_storage
from prep.config import PrepConfig
from prep.dataset.codecs import npy_bytes
from prep.dataset.layout import Unit
from prep.dataset.reader import Dataset
from prep.images import compared as module
from prep.images.compared import FOLDER, NAME, Record, compared, compared_tokens
from prep.passes import last_publication
from prep.verify.verify import verify
from tests.forked import in_child
from tests.prep.images.test_cosine import as_sets, chains, features, near_labels
from tests.prep.object_store import s3_server
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare

MANY_FILES = module.MANY_FILES


class Samples:
    """Class tokens by key; ``asked`` are the keys whose tokens were read."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = dict(sorted(vectors.items()))
        self.asked: list[str] = []

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        keys = list(self.vectors)
        for part in np.array_split(rows, 1 + len(rows) // 5):
            self.asked += [keys[row] for row in part]
            if len(part):
                yield np.stack([self.vectors[keys[row]] for row in part])

    def groups(self, storage, threshold: float = 0.98, **options) -> set[frozenset[str]]:
        """The groups that are found, which are those of a comparison of all."""
        keys = list(self.vectors)
        hashes = [sha256_bytes(npy_bytes(vector)) for vector in self.vectors.values()]
        options = {"write": True} | options
        with compared(storage, pa.array(keys), pa.array(hashes), self.read, threshold, **options) as alike:
            labels = alike.labels
            for keep in (np.arange(len(keys)) % 3 > 0, labels != labels[0]):  # as where samples link both sides
                if keep.any():
                    vectors = np.stack(list(self.vectors.values()))[keep]
                    assert as_sets(alike.kept(keep).labels) == as_sets(near_labels(vectors, threshold))
        assert as_sets(labels) == as_sets(near_labels(np.stack(list(self.vectors.values())), threshold))
        return {frozenset(keys[row] for row in group) for group in as_sets(labels)}


def samples(count: int = 40, seed: int = 0) -> Samples:
    return Samples({f"{number:032x}": vector for number, vector in enumerate(features(seed, 16, 60)[:count])})


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH", 7)
    monkeypatch.setattr(module, "MANY_FILES", 3)


@pytest.fixture(scope="module")
def endpoint():
    with s3_server("compared") as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def storage(request, tmp_path):
    if request.param == "folder":
        return open_storage(tmp_path / "out")
    request.getfixturevalue("endpoint")
    return open_storage(f"s3://compared/{tmp_path.name}")


def test_only_what_is_new_is_read(storage, small):
    all_of_them = samples()
    everything = all_of_them.groups(storage)
    assert sorted(all_of_them.asked) == list(all_of_them.vectors)
    files = storage.names("runs/")
    assert files[0] == NAME
    again = samples()
    assert again.groups(storage) == everything
    assert again.asked == []
    assert storage.names("runs/") == files
    more = samples(44)
    more.groups(storage)
    assert sorted(more.asked) == list(more.vectors)[40:]
    other = samples(44)
    other.groups(storage, 0.9)
    assert other.asked == []  # compared again, not read again
    fresh = samples(44)
    fresh.groups(storage, 0.9, anew=True, write=False)
    assert sorted(fresh.asked) == list(fresh.vectors)


@settings(deadline=None)  # a busy machine proves nothing
@given(kind=st.sampled_from([features, chains]), seed=st.integers(0, 1000), data=st.data())
def test_whatever_comes_and_goes_groups_are_those_of_all_samples(tmp_path_factory, kind, seed, data):
    """Samples come and go, some get another class token, the threshold changes, and what nobody needs is removed."""
    storage = open_storage(tmp_path_factory.mktemp("rounds") / "out")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(module, "BATCH", 11)
    monkeypatch.setattr(module, "MANY_FILES", 3)
    vectors = kind(seed, 16)
    try:
        known: dict[str, bytes] = {}
        now = dict.fromkeys(data.draw(st.sampled_from([range(40), range(0, 40, 2), range(3)])), 0)
        for _ in range(4):
            chosen = Samples({f"{key:032x}": vectors[(key + 20 * other) % 60] for key, other in now.items()})
            chosen.groups(storage, data.draw(st.sampled_from([0.9, 0.995, 0.995])))
            tokens = {key: vector.tobytes() for key, vector in chosen.vectors.items()}
            assert sorted(chosen.asked) == [key for key in tokens if known.get(key) != tokens[key]]
            known = tokens
            for key in data.draw(st.lists(st.integers(0, 39), max_size=6)):
                if now.pop(key, None) is None:
                    now[key] = 0
            now |= data.draw(st.dictionaries(st.integers(0, 39), st.integers(0, 1), min_size=not now, max_size=3))
            record = Record.load(storage)
            assert storage.names(FOLDER) == [name for name, _ in record.files]
            assert sum(rows for _, rows in record.files) <= 2 * len(record.table) + 1 or len(record.files) <= 3
    finally:
        monkeypatch.undo()


def test_what_a_lost_sample_held_together_falls_apart(tmp_path):
    storage = open_storage(tmp_path / "out")
    circle = {f"{number:032x}": vector for number, vector in enumerate(chains(0, 16))}
    assert len(Samples(circle).groups(storage, 0.995)) == len(as_sets(near_labels(chains(0, 16), 0.995)))
    fewer = Samples({key: vector for number, (key, vector) in enumerate(circle.items()) if number % 3})
    assert len(fewer.groups(storage, 0.995)) > 3
    assert fewer.asked == []


def rewritten(storage: LocalFolder, cosine: float = 0.98, **changes) -> None:
    """Change the table as no run does: a column's first value, or the threshold."""
    path = storage.root / NAME
    table = pq.read_table(path)
    metadata = table.schema.metadata[b"nanodit"].replace(b"0.98", str(cosine).encode())
    for name, value in changes.items():
        position = table.column_names.index(name)
        values = [value, *table[name].to_pylist()[1:]]
        table = table.set_column(position, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table.replace_schema_metadata({"nanodit": metadata}), path)


def changed_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def tokens_of(storage: LocalFolder) -> Path:
    return storage.root / FOLDER / "000001.npy"


DAMAGE = {
    "the table is cut": lambda s: (s.root / NAME).write_bytes((s.root / NAME).read_bytes()[:-100]),
    "the table is empty": lambda s: (s.root / NAME).write_bytes(b""),
    "another table": lambda s: pq.write_table(pa.table({"key": ["a"]}), s.root / NAME),
    "another group": lambda s: rewritten(s, group=7),
    "no group": lambda s: rewritten(s, group=None),
    "another place": lambda s: rewritten(s, place=3),
    "another key": lambda s: rewritten(s, key="f" * 32),
    "another threshold": lambda s: rewritten(s, cosine=0.99),
    "tokens are missing": lambda s: tokens_of(s).unlink(),
    "tokens are cut": lambda s: tokens_of(s).write_bytes(tokens_of(s).read_bytes()[:-4]),
    "tokens are empty": lambda s: tokens_of(s).write_bytes(b""),
    "a token is another": lambda s: changed_byte(tokens_of(s), 200),
    "a token has other numbers": lambda s: np.save(tokens_of(s), np.zeros((40, 16), np.float64)),
    "tokens are fewer": lambda s: np.save(tokens_of(s), np.zeros((39, 16), np.float32)),
    "tokens are wider": lambda s: np.save(tokens_of(s), np.zeros((40, 17), np.float32)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_costs_time_and_changes_no_group(tmp_path, capsys, damage):
    storage = open_storage(tmp_path / "out")
    samples().groups(storage)
    DAMAGE[damage](storage)
    capsys.readouterr()
    more = samples(44)  # with fewer rows nothing would be read from the files
    more.groups(storage)
    assert set(more.asked) == set(more.vectors)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "compared again" in line]
    assert line.startswith(f"{storage.where(NAME)}: ")
    again = samples(44)
    again.groups(storage)
    assert again.asked == []
    assert "compared again" not in capsys.readouterr().out


def test_files_of_another_dataset_count_for_nothing(tmp_path):
    ours, theirs = (open_storage(tmp_path / name) for name in ("ours", "theirs"))
    samples(seed=1).groups(theirs)
    shutil.copytree(theirs.root, ours.root)
    mine = samples()  # the same keys, other tokens
    mine.groups(ours)
    assert sorted(mine.asked) == list(mine.vectors)


def test_what_is_deleted_is_only_read_again(tmp_path):
    storage = open_storage(tmp_path / "out")
    everything = samples().groups(storage)
    shutil.rmtree(storage.root / FOLDER)
    again = samples()
    assert again.groups(storage) == everything  # also the groups without some samples, whose tokens are needed
    (storage.root / NAME).unlink()
    anew = samples()
    assert anew.groups(storage) == everything
    assert sorted(anew.asked) == list(anew.vectors)


def test_tokens_of_two_widths_are_refused(tmp_path):
    two = Samples({"a": np.ones(8, np.float32), "b": np.ones(9, np.float32)})
    two.read = lambda rows: iter([np.ones((1, 8), np.float32), np.ones((1, 9), np.float32)])
    with pytest.raises(DataError, match="class tokens have 8 and 9 numbers"):
        two.groups(open_storage(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.npy*"))


def test_without_leave_to_write_nothing_is_written(tmp_path):
    reader = samples()
    reader.groups(open_storage(tmp_path / "out"), write=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("moment", ["tokens.after_file", "tokens.after_record"])
def test_killed_between_two_writes(tmp_path, small, moment, number):
    storage = open_storage(tmp_path / "out")

    def compare() -> None:
        module.MANY_FILES = MANY_FILES
        samples().groups(storage)

    assert in_child(compare, f"{moment}:kill:{number}") == -signal.SIGKILL
    again = samples()
    again.groups(storage)
    committed = number - (moment == "tokens.after_file")
    assert sorted(again.asked) == list(again.vectors)[7 * committed :]  # what was committed is not read again
    assert storage.names("runs/") == [NAME, *(name for name, _ in Record.load(storage).files)]


# --- in a dataset -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_images(folder / "source", 8)
    prepare(by_class_tokens(folder))
    return folder


def by_class_tokens(folder: Path) -> PrepConfig:
    return config(folder, layers=["dino"], duplicates={"cls_cosine": 0.98}, holdout=0.4)


def files_of(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in paths
        if path.relative_to(root).parts[0] not in ("runs", "kept")
    }


def test_a_dataset_is_the_same_with_and_without_what_was_written_down(published, tmp_path, capsys):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "out"
    assert (root / NAME).exists()
    tokens = {row["key"]: Dataset(root).cls(row) for row in Dataset(root).rows()}
    stored = np.load(root / FOLDER / "000001.npy")
    assert {row.tobytes() for row in stored} == {token.tobytes() for token in tokens.values()}
    write_images(tmp_path / "source", 4, first=8)
    prepare(by_class_tokens(tmp_path))
    assert "class tokens: 4 samples" in capsys.readouterr().out
    with_it = files_of(root)
    verify(root)
    assert "class tokens" not in capsys.readouterr().out
    verify(root, full=True)
    assert "class tokens: 12 samples" in capsys.readouterr().out
    shutil.rmtree(root / FOLDER)
    (root / NAME).unlink()
    (root / "index.parquet").write_bytes(b"")
    shutil.copy(published / "out" / "index.parquet", root)
    prepare(by_class_tokens(tmp_path))
    assert files_of(root) == with_it
    verify(root)


def test_a_damaged_class_token_is_named(published, tmp_path):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    storage, index = open_storage(tmp_path / "out"), pq.read_table(tmp_path / "out" / "index.parquet")
    row = Dataset(tmp_path / "out").rows()[5]
    unit = Unit(row["bucket"], row["shard"], "dino")
    changed_byte(tmp_path / "out" / unit.tar, row["dino/cls.npy/offset"] + row["dino/cls.npy/length"] - 1)
    with compared_tokens(storage, index, 0.98) as known:  # whose token is remembered, and not read
        before = known.labels
    with (
        pytest.raises(DataError, match=rf"{unit.tar}, sample {row['key']}, member cls.npy.*not those"),
        compared_tokens(storage, index, 0.98, anew=True),
    ):
        pass
    assert len(before) == 8


def test_a_class_token_of_another_form_is_named(published, tmp_path):
    """Its hash is that of the index: nothing was damaged, somebody wrote it so."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    storage, index = open_storage(tmp_path / "out"), pq.read_table(tmp_path / "out" / "index.parquet")
    rows = index.to_pylist()
    number = next(i for i, row in enumerate(rows) if i and row["shard"] == rows[i - 1]["shard"] == 0)
    row = rows[number]
    unit, start, length = (
        Unit(row["bucket"], row["shard"], "dino"),
        row["dino/cls.npy/offset"],
        row["dino/cls.npy/length"],
    )
    tar = tmp_path / "out" / unit.tar
    data = tar.read_bytes()
    for old, new in ((b"<f4", b"|O8"), (b"(96,), }", b"(4,24)} ")):
        member = data[start : start + length].replace(old, new)
        tar.write_bytes(data[:start] + member + data[start + length :])
        row["dino/cls.npy/sha256"] = sha256_bytes(member)
        with (
            pytest.raises(DataError, match=rf"{unit.tar}, sample {row['key']}, member cls.npy"),
            compared_tokens(storage, pa.Table.from_pylist(rows, index.schema), 0.98, anew=True),
        ):
            pass


def test_verify_compares_anew_when_asked_to(published, tmp_path, capsys):
    """A record that is wrong in itself, as a bug might leave it, deceives a publication and a verification alike."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    storage = open_storage(tmp_path / "out")
    record = Record.load(storage)
    groups = pa.array(np.arange(len(record.table)))
    assert record.column("group").tolist() != groups.to_pylist()
    record.table = record.table.set_column(3, "group", groups)
    record.save(storage)
    storage.delete(last_publication.NAME)  # or nothing would be published again
    prepare(by_class_tokens(tmp_path))
    verify(tmp_path / "out")
    with pytest.raises(DataError):
        verify(tmp_path / "out", full=True)
    assert "computed again it is" in capsys.readouterr().out

"""Checks of one unit: its tar is the committed one, is built as ours are, and holds what it should.

Nothing is extracted and no name from a tar is ever opened: the tar is read as bytes, its headers are compared with what
the index part says must be there, and arrays are parsed from NPY headers that cannot hold a pickle.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from nanodit.errors import DataError, NanoditError
from nanodit.files import sha256_bytes
from nanodit.storage import Storage
from prep.dataset.layers import LAYERS
from prep.dataset.layout import (
    DAMAGED,
    SCHEMA_VERSION,
    TAR_BLOCK,
    Part,
    Rejection,
    Unit,
    members_of,
    part_schema,
    read_parquet,
)

KEY = re.compile(r"[0-9a-f]{32}")
READERS = 4  # tars in memory at a time, half a gigabyte each at most
BOMB = Image.DecompressionBombError
NAMED = 3  # findings of one kind that a unit lists by name; a tar cut in half would otherwise fill the screen


@dataclass(frozen=True)
class Finding:
    """A problem: ``kind`` is "damaged", "leak", "orphan" or "older", ``file`` a name below the dataset."""

    kind: str
    file: str
    problem: str
    key: str = ""
    unit: Unit | None = None  # what has to be computed again

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}{f', sample {self.key}' if self.key else ''}: {self.problem}"


@dataclass
class CheckedUnit:
    """A unit as far as it could be read."""

    unit: Unit
    part: Part | None = None
    findings: list[Finding] = field(default_factory=list)
    class_tokens: set[str] = field(default_factory=set)  # of the samples whose one is whole

    def damaged(self, file: str, problem: str, key: str = "") -> None:
        """Add a finding of damage."""
        self.findings.append(Finding("damaged", file, problem, key, self.unit))


def check_unit(storage: Storage, unit: Unit) -> CheckedUnit:
    """Read a unit's index part and tar and compare them with each other and with the format."""
    checked = CheckedUnit(unit)
    part = checked.part = _check_part(storage, checked)
    if part is None:
        return checked
    try:
        data = storage.read(unit.tar)
    except FileNotFoundError:
        checked.findings.append(Finding("orphan", unit.part, f"{unit.tar} is missing", unit=unit))
        return checked
    except OSError as error:
        checked.damaged(unit.tar, f"cannot be read: {error.strerror}")
        return checked
    if len(data) != part.tar_bytes:
        checked.damaged(unit.tar, f"has {len(data)} bytes, but {part.tar_bytes} were committed")
    elif sha256_bytes(data) != part.tar_sha256:
        checked.damaged(unit.tar, "the bytes are not those that were committed (SHA-256 differs)")
    _check_structure(data, part, checked)
    _check_members(memoryview(data), part, checked)
    return checked


def _check_part(storage: Storage, checked: CheckedUnit) -> Part | None:
    unit = checked.unit
    try:
        table = read_parquet(storage.read(unit.part))
        record = json.loads((table.schema.metadata or {}).get(b"nanodit", b""))
        rejects = tuple(Rejection(**reject) for reject in record["rejects"])
        part = Part(unit, record["recipe"], record["facts"], record["tar_bytes"], record["tar_sha256"], rejects, table)
        described = tuple(record[name] for name in ("schema", "bucket", "shard", "layer"))
        expected = part_schema(unit.layer, part.recipe)
    except DAMAGED as error:
        checked.damaged(unit.part, f"is not an index part ({type(error).__name__}: {error})")
        return None
    if described != (SCHEMA_VERSION, unit.bucket, unit.shard, unit.layer):
        checked.damaged(unit.part, f"describes another unit or schema: {described}")
        return None
    if table.schema.remove_metadata() != expected:
        wrong = {item.name for item in set(table.schema) ^ set(expected)}
        if part.recipe.get("code") in range(LAYERS[unit.layer].code):
            problem = f"was made by an older version, without {', '.join(sorted(wrong))}"
            checked.findings.append(Finding("older", unit.part, problem, unit=unit))
            return None
        checked.damaged(unit.part, f"has columns of another kind: {', '.join(sorted(wrong)) or 'their order'}")
        return None
    keys = table["key"].to_pylist()
    if keys != sorted(set(keys)) or not all(isinstance(key, str) and KEY.fullmatch(key) for key in keys):
        checked.damaged(unit.part, "keys are not sorted, unique and of 32 hexadecimal digits")
        return None
    return part


# --- the tar ----------------------------------------------------------------------------------------------------------


def _check_structure(data: bytes, part: Part, checked: CheckedUnit) -> None:
    """Check that every header is a plain file's, in the order and place that the part says, and nothing follows."""
    tar = part.unit.tar
    expected = [(key, member, offset, length) for key, member, offset, length, _ in _members(part)]
    names: set[str] = set()
    ours = {f"{key}.{member}" for key, member, *_ in expected}
    place = end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", format=tarfile.USTAR_FORMAT) as archive:
            for info in archive:
                wanted = expected[place] if place < len(expected) else None
                problem = _problem(info, names, ours, wanted)
                if problem:
                    checked.damaged(tar, f"member {info.name!r} {problem}", wanted[0] if wanted else "")
                    return
                names.add(info.name)
                place += 1
                end = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
    except (tarfile.TarError, EOFError, ValueError) as error:
        checked.damaged(
            tar, f"is not a tar after {place} members ({error})", expected[place][0] if expected[place:] else ""
        )
        return
    if place < len(expected):
        key, member, *_ = expected[place]
        checked.damaged(tar, f"ends before member {key}.{member}", key)
    elif any(data[end:]) or len(data) != -(-(end + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE:
        checked.damaged(tar, f"holds something else after its last member, at byte {end}")


def _problem(info: tarfile.TarInfo, names: set[str], ours: set[str], wanted: tuple | None) -> str:
    """Return why a member is not the wanted one, or "". ``names`` came before it, ``ours`` are all that belong."""
    if not info.isreg() or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kinds = {"issym": "symbolic link", "islnk": "hard link", "isdir": "folder", "isdev": "device"}
        kind = next((text for name, text in kinds.items() if getattr(info, name)()), "special file")
        return f"is a {kind}, not a plain file"
    # tarfile strips nothing; a name of ours is KEY.MEMBER, without any folder
    if info.name.startswith(("/", "\\")) or re.match("[A-Za-z]:", info.name):
        return "has an absolute name"
    if ".." in re.split(r"[/\\]", info.name):
        return "leads out of the folder"
    if info.name in names:
        return "appears twice"
    if wanted is None or info.name != f"{wanted[0]}.{wanted[1]}":
        if info.name in ours:
            return f"is interleaved or out of order: {wanted[0]}.{wanted[1]} was committed here"
        return f"does not belong to this unit{f': {wanted[0]}.{wanted[1]} was committed here' if wanted else ''}"
    if (info.offset_data, info.size) != (wanted[2], wanted[3]) or info.offset != info.offset_data - TAR_BLOCK:
        return f"lies at byte {info.offset_data} with {info.size} bytes, but {wanted[2]} and {wanted[3]} were committed"
    return ""


def _members(part: Part) -> Iterator[tuple[str, str, int, int, str]]:
    """Yield key, member, offset, length and SHA-256 of everything in a unit, in the order of its tar."""
    layer, members = part.unit.layer, members_of(part.unit.layer, part.recipe)
    columns = [
        [part.table[f"{layer}/{member}/{name}"].to_pylist() for name in ("offset", "length", "sha256")]
        for member in members
    ]
    for row, key in enumerate(part.table["key"].to_pylist()):
        for member, (offsets, lengths, hashes) in zip(members, columns):
            yield key, member, offsets[row], lengths[row], hashes[row]


# --- what the members say ---------------------------------------------------------------------------------------------


def _check_members(data: memoryview, part: Part, checked: CheckedUnit) -> None:
    """Check that every member has its hash, and the kind, shape, finite numbers and words that its layer promises."""
    rows = {row["key"]: row for row in part.table.to_pylist()}
    kinds = {member.name: member.kind for member in LAYERS[part.unit.layer].members_of(part.recipe)}
    bad = 0
    for key, member, offset, length, sha256 in _members(part):
        try:
            content = data[offset : offset + length] if None not in (offset, length) else b""
            if len(content) != length or sha256_bytes(content) != sha256:
                raise DataError("the bytes are not those that were committed (SHA-256 differs)")
            kinds[member].check(bytes(content), rows[key], part)
        except (ValueError, KeyError, TypeError, OSError, RecursionError, BOMB, NanoditError) as error:
            bad += 1
            if bad <= NAMED:
                checked.damaged(part.unit.tar, f"{member}: {error}", key)
            continue
        if (part.unit.layer, member) == ("dino", "cls.npy"):
            checked.class_tokens.add(key)
    if bad > NAMED:
        checked.damaged(part.unit.tar, f"{bad - NAMED} more members are damaged")

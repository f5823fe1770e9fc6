"""Damage inside a JPEG that its decoder passes over: what is certain, found without decoding (ITU-T T.81, annex B).

libjpeg fills what it cannot decode with grey or shifts the blocks behind it, and Pillow hands out no warning. Only what
no encoder can have written counts here: how often a damaged file is noticed stands in docs/measurements.md.
"""

from __future__ import annotations

import math
import struct

import numpy as np

ZEROS = 64  # bytes in a row: more than any block of coefficients takes, see `_never_zero`
ZEROS_RUN = bytes(ZEROS)
LONGEST_CODE = 4  # bits of the shortest code of a table, so that a block has at most 63 * (4 + 1) bits of zeros
SEQUENTIAL = (0xC0, 0xC1)  # Huffman-coded; progressive scans code runs of empty blocks
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
RESTART = 0xD0  # to 0xD7
DHT, EOI, SOS, DNL, DRI = 0xC4, 0xD9, 0xDA, 0xDC, 0xDD
BEHIND_A_SCAN = (DHT, EOI, SOS, 0xDB, DNL, DRI, *range(0xE0, 0xF0), 0xFE)


def find_damage(data: bytes) -> str | None:
    """Return what is wrong inside the scans of a JPEG; None where nothing is certain, and for other formats."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        return _walk(data)
    except (
        struct.error,
        ValueError,
        IndexError,
        KeyError,
        ZeroDivisionError,
        StopIteration,
    ):  # cut off or odd: its decoder knows more
        return None


def _walk(data: bytes) -> str | None:
    position, interval, frame = 2, 0, (0, 0, 0)  # frame: its marker, height, width
    places, codes = _markers(data)
    first: dict[int, tuple[int, int]] = {}  # AC table -> bits and symbol of its code of zeros
    sizes: dict[int, tuple[int, int]] = {}  # component -> its sampling factors
    while True:
        fill, marker, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF or marker < 0xC0 or 0xD0 <= marker <= EOI:
            return None
        body, position = data[position + 4 : position + 2 + length], position + 2 + length
        if marker == DHT:
            first |= _codes_of_zeros(body)
        elif marker == DRI:
            (interval,) = struct.unpack(">H", body)
        elif marker in FRAMES:
            frame = (marker, *struct.unpack(">HH", body[1:5]))
            sizes = {body[at]: (body[at + 1] >> 4, body[at + 1] & 15) for at in range(6, len(body), 3)}
        elif marker == SOS:
            start = int(np.searchsorted(places, position))
            ends = np.flatnonzero((codes[start:] & 0xF8) != RESTART)
            if not len(ends):  # the end marker is missing
                return "its data end in zeros, without an end marker" if data.endswith(ZEROS_RUN) else None
            last = start + int(ends[0])
            end, behind, restarts = int(places[last]), int(codes[last]), (codes[start:last] & 7).tolist()
            if behind not in BEHIND_A_SCAN:
                return f"the marker ff {behind:02x} lies inside the picture's data"
            parts = {body[at]: body[at + 1] & 15 for at in range(1, 1 + 2 * body[0], 2)}  # component -> AC table
            if frame[0] in SEQUENTIAL:
                if problem := _wrong_restarts(restarts, interval, frame[2], frame[1], sizes, list(parts)):
                    return problem
                at = data.find(ZEROS_RUN, position, end) if _never_zero(first, list(parts.values())) else -1
                if at >= 0 and data[at:end].strip(b"\0"):  # some fill the last sector with zeros, before the end marker
                    return f"{ZEROS} zeros or more in a row, at byte {at}"
            position = end
            if behind == EOI:
                return None


def _markers(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the places and codes of everything that looks like a marker; within a segment these are accidents."""
    values = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(values[:-1] == 0xFF)
    codes = values[places + 1]
    real = (codes != 0) & (codes != 0xFF)  # a stuffed byte and a fill byte
    return places[real], codes[real]


def _codes_of_zeros(tables: bytes) -> dict[int, tuple[int, int]]:
    """Return, of each AC table in a DHT segment, the bits of the code that is all zeros, and its symbol: the first."""
    found, at = {}, 0
    while at < len(tables):
        counts = tables[at + 1 : at + 17]
        if tables[at] >> 4:
            found[tables[at] & 15] = next(bits for bits, count in enumerate(counts, 1) if count), tables[at + 17]
        at += 17 + sum(counts)
    return found


def _never_zero(first: dict[int, tuple[int, int]], tables: list[int]) -> bool:
    """Whether zeros would make some component of a scan a block in which no coefficient is 0, and another behind it.

    In the tables of annex K zeros are coefficients of -1 in the luma. In tables made for one picture they may mean "the
    rest of the block is 0" in all components: a flat picture is a run of zeros then, and nothing can be known.
    """
    codes = [first[table] for table in tables]
    return any(symbol & 15 and bits <= LONGEST_CODE for bits, symbol in codes)


def _wrong_restarts(
    found: list[int], interval: int, width: int, height: int, sizes: dict[int, tuple[int, int]], parts: list[int]
) -> str | None:
    """Return how the restart markers of a scan, by number, differ from those that its size and interval ask for."""
    if not interval:
        return "a restart marker in a picture without restarts" if found else None
    across, down = (max(size[axis] for size in sizes.values()) for axis in (0, 1))
    if len(parts) == 1:  # not interleaved: A.2.2
        h, v = sizes[parts[0]]
        units = math.ceil(math.ceil(width * h / across) / 8) * math.ceil(math.ceil(height * v / down) / 8)
    else:
        units = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    wanted = math.ceil(units / interval) - 1
    if height and (len(found) not in (wanted, wanted + 1) or found != [number % 8 for number in range(len(found))]):
        return f"{len(found)} restart markers, or out of order, where {wanted} belong"
    return None

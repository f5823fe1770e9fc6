"""Checks of what is kept of earlier versions: every file is what its name says, and no version lacks any."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from nanodit.console import Progress
from nanodit.files import sha256_bytes
from nanodit.storage import Storage
from prep.dataset import versions
from prep.dataset.layout import fingerprint_of
from prep.verify.units import READERS, Finding


def check_kept(storage: Storage, current: Mapping[str, str]) -> list[Finding]:
    """Return kept files that are not what their name says, and what a kept version lacks.

    ``current`` has the hashes of the tars that are committed now, of which a version may consist, too.
    """
    names = set(storage.names(versions.FOLDER))
    files = sorted(name for name in names if name.endswith((".tar", ".parquet")))
    findings: list[Finding] = []
    if not names:
        return findings

    def hashed(name: str) -> str:
        data = storage.read_if_there(name)  # a run may have dropped it meanwhile
        return "" if data is None else sha256_bytes(data)

    with (
        Progress("verify", len(files), "kept files") as progress,
        ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1)) as pool,
    ):
        for name, sha256 in zip(files, pool.map(hashed, files)):
            if sha256 and name not in (versions.kept_tar(sha256), versions.kept_table(sha256)):
                findings.append(_bad(name, "the bytes are not those that were kept (SHA-256 differs)"))
            progress.advance()
    for fingerprint in versions.kept_versions(storage, names):
        if problem := _problem(storage, fingerprint, names, current):
            findings.append(_bad(versions.kept_description(fingerprint), problem))
    return findings


def _problem(storage: Storage, fingerprint: str, names: set[str], current: Mapping[str, str]) -> str:
    """Return why a kept version cannot be read whole; empty where it can."""
    info = versions.kept_versions(storage, [versions.kept_description(fingerprint)])[fingerprint]
    tars = versions.tars_of(storage, fingerprint)
    if info is None or tars is None:
        return "it, or the list of its tars, is damaged"
    if fingerprint_of({name: value for name, value in info.items() if name != "fingerprint"}) != fingerprint:
        return "its fingerprint does not match its content"
    if lost := [name for name, sha256 in info["hashes"].items() if versions.kept_table(sha256) not in names]:
        return f"{', '.join(lost)} of this version is missing"
    lost = [name for name, sha256 in tars.items() if current.get(name) != sha256]
    lost = [name for name in lost if versions.kept_tar(tars[name]) not in names]
    return f"{len(lost)} of its tars are missing, for example {lost[0]}" if lost else ""


def _bad(file: str, problem: str) -> Finding:
    return Finding("damaged", file, problem)

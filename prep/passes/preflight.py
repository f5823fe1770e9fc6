"""What is checked before a run computes anything: that every node can read the source and write the output, with room.

A folder that only one machine sees, a read-only mount or a container's 64 MB of shared memory would otherwise show
after hours, as a stall or as a dataset in two halves. Raises ResourceError (exit code 4).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from nanodit.errors import ConfigError, ResourceError
from nanodit.storage import Storage, absolute_place, open_storage
from prep.config import PrepConfig
from prep.passes.cost import bytes_needed, check_room
from prep.passes.plan import Plan

SHARED_MEMORY = Path("/dev/shm")
# the least that Ray accepts for its object store (OBJECT_STORE_MINIMUM_MEMORY_BYTES of ray_constants.py); with less
# shared memory it uses files in /tmp, and Docker's default is 64 MB
MIN_SHARED_MEMORY = 75 * 1024 * 1024
TOKEN = ".preflight.tmp-"  # named as temporary files are, so that the next run collects what a killed one leaves
LOOKED_AT = 3  # source files that every node reads the beginning of
TIMEOUT = 60.0  # seconds for all nodes to answer; a network mount may have to wake up
NAMED = 3


def preflight(config: PrepConfig, plan: Plan, on_every_node: Callable[..., dict[str, Any]]) -> None:
    """Check storage and memory on every node.

    ``on_every_node(function, *arguments, timeout=seconds)`` calls a function of a module on each node and returns node
    id -> result or exception. Raises ResourceError that says what is wrong where, and what to do; ConfigError for an
    output that would vanish with a submitted job.
    """
    storage = open_storage(config.output)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and storage.is_local and not Path(config.output).is_absolute():
        raise ConfigError(
            f"output {config.output} is relative, and a submitted job runs in a temporary copy of the code, which is "
            "deleted with it. Set output to an absolute path on storage that all nodes share"
        )
    check_room(plan)
    token = secrets.token_hex(8)
    names = [TOKEN + token]
    try:
        _write(storage, names[0], token)
        folder = str(Path(config.source).absolute())
        # a source that changed since the plan is a reject, not a node's fault
        samples = [(source.name, source.size_bytes) for source in islice(plan.sources.values(), LOOKED_AT)]
        samples = [sample for sample in samples if not _unread(folder, [sample])]
        answers = on_every_node(look, absolute_place(config.output), folder, token, samples, timeout=TIMEOUT)
        problems = []
        for node, answer in answers.items():
            if isinstance(answer, BaseException):
                problems.append(f"node {node[:8]} did not answer: {answer}")
                continue
            problems += [f"{answer['host']}: {problem}" for problem in answer["problems"]]
            if answer["name"]:
                names.append(answer["name"])
                problems += _unseen(storage, answer)
            if not storage.is_local:
                problems += _scratch(plan, answer)
    finally:
        for name in names:
            _forget(storage, name)
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ResourceError("; ".join(problems[:NAMED]) + more)


def look(output: str, source: str, token: str, samples: list[tuple[str, int]]) -> dict[str, Any]:
    """Try, on the node where it runs, everything that a worker will do there; runs in a process of Ray.

    Returns the host's name, the problems as sentences, the name of the file it wrote into the output ("" for none), the
    bytes free for temporary files and the number of CPUs.
    """
    host = os.uname().nodename
    name, problems = "", []
    try:
        storage = open_storage(output)
        # a name of its own: several nodes may share a host
        mine = f"{TOKEN}{token}-{secrets.token_hex(4)}"
        if storage.read(TOKEN + token).decode() != token:
            problems.append(f"output {output} is not the folder that the driver writes")
        else:
            storage.write(mine, token)
            name = mine
    except FileNotFoundError:
        problems.append(
            f"output {output} is not shared: what the driver wrote is not there. Mount one shared folder at the same "
            "path on every node, or use an object store (output=s3://BUCKET/NAME)"
        )
    except Exception as error:  # whatever it is, the run would meet it again
        problems.append(_cannot_write(output, error))
    problems += _unread(source, samples)
    problems += _shared_memory()
    scratch = shutil.disk_usage(tempfile.gettempdir()).free
    return {"host": host, "problems": problems, "name": name, "scratch": scratch, "cpus": os.cpu_count() or 1}


def _unread(source: str, samples: list[tuple[str, int]]) -> list[str]:
    for name, size in samples:
        try:
            with open(Path(source) / name, "rb") as file:
                file.read(1)
                found = os.fstat(file.fileno()).st_size
        except OSError as error:
            return [
                f"source {source} cannot be read ({name}: {error.strerror}). Mount it at the same absolute path on "
                "every node"
            ]
        if found != size:
            return [f"source {source} is another folder: {name} has {found} bytes, but the driver sees {size}"]
    return []


def _shared_memory() -> list[str]:
    try:
        size = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:  # not Linux
        return []
    if size >= MIN_SHARED_MEMORY:
        return []
    return [
        f"{SHARED_MEMORY} has {size / 2**20:.0f} MB and Ray needs at least {MIN_SHARED_MEMORY / 2**20:.0f}. In a "
        "container: docker run --shm-size=2g"
    ]


def _unseen(storage: Storage, answer: dict[str, Any]) -> list[str]:
    """Whether the driver sees what a node wrote: a folder may be shared in one direction only, or by a lazy cache."""
    try:
        storage.read(answer["name"])
    except OSError:
        return [
            f"{answer['host']}: the driver does not see what this node writes to output {storage}. Mount the same "
            "folder on both"
        ]
    return []


def _scratch(plan: Plan, answer: dict[str, Any]) -> list[str]:
    """Whether a node has room for one unit of every worker, which is written locally before it is uploaded."""
    shards = max(1, len(plan.shards))
    needed = max((size / shards for size in bytes_needed(plan).values()), default=0) * answer["cpus"]
    if answer["scratch"] >= needed:
        return []
    return [
        f"{answer['host']}: {answer['scratch'] / 1e9:.2f} GB are free for temporary files, but {needed / 1e9:.2f} GB "
        "are needed. Make room, or set TMPDIR to a larger disk"
    ]


def _write(storage: Storage, name: str, token: str) -> None:
    try:
        storage.write(name, token)
    except OSError as error:
        raise ResourceError(_cannot_write(str(storage), error)) from error


def _cannot_write(output: str, error: Exception) -> str:
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    advice = "Choose another output, or give the user of this process the right to write there"
    if number == errno.EROFS:
        advice = "It is mounted read-only: mount it writable, or choose another output"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        advice = "Make room, raise the quota, or choose another output"
    return f"output {output} cannot be written: {reason}. {advice}"


def _forget(storage: Storage, name: str) -> None:
    with suppress(OSError):  # where nothing could be written there is nothing to remove
        storage.delete(name)

"""A dataset's place: a folder, or a prefix in an object store written as a URL (``s3://bucket/name``).

Both promise the same of every file: a reader sees its old content or all of the new one, whatever is killed when. A
folder keeps that with a temporary name, fsync, ``os.replace`` and fsync of the folder; an object store by itself,
because an object appears when its upload is complete (Amazon S3 user guide, "data consistency model") - so there are no
renames and no appends here, and what commits something else is written last.

Names are relative POSIX paths, ``parts/bucket_64x64-shard-000000.px.parquet`` for example.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nanodit.errors import ConfigError, NanoditError, ResourceError
from nanodit.files import sha256_bytes, sync_folder, temporary_beside, write_atomic

URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://(?P<path>[^?#]*)")
HALF_URL = re.compile(r"[a-z][a-z0-9+.-]+:/.*|pipe:.*")  # one slash is missing, or more is wrong; C:/x is a folder
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "memory": "fsspec"}  # object stores: what reads them
EXTRAS = {"s3": "nanodit[s3]"}
# where killed writers leave ``.NAME.tmp-RANDOM-PROCESS``
TEMPORARY_FOLDERS = ("", "parts", "bucket_*", "captions/*", "kept", "readers", "runs", "runs/*")


class Storage(ABC):
    """The place of one dataset's files; ``place`` is the folder's path or the URL, as the user wrote it.

    Holds no open files and no connections of another process: it may be shared by threads, forked, and sent to workers.
    """

    is_local: bool
    place: str

    @property
    def url(self) -> str:
        """Return the place as text, for messages and configs."""
        return self.place

    def __str__(self) -> str:
        return self.place

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the full path or URL of a file, for messages."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return all of a file. Raises OSError (FileNotFoundError) when it cannot be read."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading, of which it is then the content that it had. Raises OSError as :meth:`read`."""
        return io.BytesIO(self.read(name))

    def read_if_there(self, name: str) -> bytes | None:
        """Return all of a file, None where there is none; ResourceError for one that is there and cannot be read."""
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _cannot_read(self.where(name), error) from error

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends before. Raises OSError as :meth:`read`."""

    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Return what :meth:`read_range` does for several offsets and lengths of one file."""
        return [self.read_range(name, offset, length) for offset, length in ranges]

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the bytes of a file as a number, None where there is no such file."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return self.size(name) is not None

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """List the names of all files that begin with ``prefix``, sorted; also of those in subfolders."""

    @abstractmethod
    def write(self, name: str, data: bytes | str) -> None:
        """Write a whole file, durable and atomic; text as UTF-8."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, durably; nothing happens where there is none."""

    @abstractmethod
    def link(self, name: str, other: str) -> None:
        """Let a file's content stand under another name too, durable and atomic, whatever becomes of the first one.

        Without a second copy where the place can do that. Nothing happens where the other name is taken. Raises
        FileNotFoundError where there is no such file.
        """

    @abstractmethod
    def draft(self, name: str) -> Path:
        """Create a local file to write a large one in, for :meth:`put_file`; who fails before that removes it."""

    @abstractmethod
    def put_file(self, name: str, path: Path) -> None:
        """Move a complete local file, made with :meth:`draft`, to its name; durable and atomic as :meth:`write`."""

    @abstractmethod
    def remove_temporary_files(self) -> None:
        """Remove what killed writers left half-written; only for the holder of the dataset's lock."""

    @abstractmethod
    def remove_empty_folders(self) -> None:
        """Remove shard folders without files."""


class LocalFolder(Storage):
    """A folder of this machine or of a shared file system."""

    is_local = True

    def __init__(self, place: Path | str) -> None:
        self.place, self.root = str(place), Path(place)

    def where(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return open(self.root / name, "rb")

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with open(self.root / name, "rb", buffering=0) as file:
            file.seek(offset)  # Windows has no os.pread
            return file.read(length)

    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        with open(self.root / name, "rb", buffering=0) as file:
            return [file.read(length) for offset, length in ranges if file.seek(offset) is not None]

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _cannot_read(self.where(name), error) from error

    def names(self, prefix: str = "") -> list[str]:
        start, _, beginning = prefix.rpartition("/")
        found = []

        def refuse(error: OSError) -> None:  # what cannot be listed is not empty
            # lost+found and the like, which belong to the system, lie at the top of a disk; none begins as ours do
            foreign = (
                prefix in ("", ".") and isinstance(error, PermissionError) and Path(error.filename).parent == self.root
            )
            if not foreign and not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise _cannot_read(str(error.filename), error) from error

        for folder, folders, files in os.walk(self.root / start, onerror=refuse):
            here = Path(folder).relative_to(self.root)
            if here == Path(start):  # the only level at which a name can begin otherwise
                folders[:] = [name for name in folders if name.startswith(beginning)]
                files = [name for name in files if name.startswith(beginning)]
            found += [(here / name).as_posix() for name in files]
        return sorted(found)

    def write(self, name: str, data: bytes | str) -> None:
        write_atomic(self.root / name, data)

    def delete(self, name: str) -> None:
        path = self.root / name
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        sync_folder(path.parent)

    def link(self, name: str, other: str) -> None:
        path = self.root / other
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self.root / name, path)
        except FileNotFoundError:
            raise
        except FileExistsError:
            return
        except OSError:  # a file system without hard links, or a system that allows none of another user's files
            draft = self.draft(other)
            try:
                shutil.copyfile(self.root / name, draft)
                self.put_file(other, draft)
            finally:
                draft.unlink(missing_ok=True)
        sync_folder(path.parent)

    def draft(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = temporary_beside(path)
        draft.open("xb").close()
        return draft

    def put_file(self, name: str, path: Path) -> None:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(path, self.root / name)
        sync_folder((self.root / name).parent)

    def remove_temporary_files(self) -> None:
        for pattern in TEMPORARY_FOLDERS:
            for folder in self.root.glob(pattern) if pattern else [self.root]:
                for path in folder.glob(".*.tmp-*"):
                    path.unlink(missing_ok=True)

    def remove_empty_folders(self) -> None:
        for folder in self.root.glob("bucket_*"):
            if not any(folder.iterdir()):
                folder.rmdir()


class ObjectStore(Storage):
    """A prefix of an object store, through fsspec; credentials and endpoint come from the environment, never a config.

    Tested with S3; the other stores of ``PACKAGES`` upload whole objects as well.
    """

    is_local = False

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        self.protocol, _, self.path = self.place.partition("://")
        self._client: tuple[int, Any] | None = None  # process, file system
        # drafts of all processes of this machine that write this dataset, so that the next run can collect them
        self._drafts = f"nanodit-{sha256_bytes(self.place.encode())[:16]}-"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    @property
    def client(self) -> Any:
        """Return this process's fsspec file system; a client's connections and event loop do not survive a fork."""
        if self._client is None or self._client[0] != os.getpid():
            try:
                import fsspec

                client = fsspec.filesystem(self.protocol, use_listings_cache=False)
            except ImportError as error:
                package = PACKAGES[self.protocol]
                raise ConfigError(
                    f"{self.place} needs the package {package}, which is not installed. "
                    f"Run: pip install '{EXTRAS.get(self.protocol, package)}'"
                ) from error
            self._client = (os.getpid(), client)
        return self._client[1]

    def _full(self, name: str) -> str:
        return f"{self.path}/{name}"

    def where(self, name: str) -> str:
        return f"{self.place}/{name}"

    @contextmanager
    def _asking(self, name: str, writing: bool = False) -> Iterator[None]:
        """Turn what a client raises into FileNotFoundError or a ResourceError that says where and what to do."""
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            if writing:
                raise ResourceError(
                    f"{self.where(name)}: there is no such bucket. Create it, or correct its name"
                ) from error
            raise FileNotFoundError(errno.ENOENT, "No such object", self.where(name)) from error
        except (NanoditError, FileExistsError):
            raise
        except Exception as error:  # each store has its own kinds, for credentials, networks and permissions
            raise ResourceError(
                f"{self.where(name)}: {type(error).__name__}: {error}. Check the network, the credentials and the "
                "endpoint in the environment (for S3: AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)"
            ) from error

    def read(self, name: str) -> bytes:
        with self._asking(name):
            return self.client.cat_file(self._full(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with self._asking(name):
            try:
                return self.client.cat_file(self._full(name), start=offset, end=offset + length)
            except Exception as error:
                return _behind_the_end(error)

    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        paths, starts = [self._full(name)] * len(ranges), [offset for offset, _ in ranges]
        ends = [offset + length for offset, length in ranges]
        with self._asking(name):
            found = self.client.cat_ranges(paths, starts, ends, on_error="return")  # at the same time
            return [data if isinstance(data, bytes) else _behind_the_end(data) for data in found]

    def size(self, name: str) -> int | None:
        try:
            with self._asking(name):
                info = self.client.info(self._full(name))
        except FileNotFoundError:
            return None
        return info["size"] if info["type"] == "file" else None

    def names(self, prefix: str = "") -> list[str]:
        folder = prefix.rpartition("/")[0]
        found: list[str] = []
        with suppress(FileNotFoundError), self._asking(prefix):
            found = self.client.find(self._full(folder) if folder else self.path)
        start = self.client._strip_protocol(self.place).strip("/") + "/"
        names = (path.strip("/").removeprefix(start) for path in found)
        return sorted(name for name in names if name.startswith(prefix))

    def write(self, name: str, data: bytes | str) -> None:
        with self._asking(name, writing=True):
            self.client.pipe_file(self._full(name), data.encode() if isinstance(data, str) else data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; False, and nothing is changed, where it does."""
        try:
            with self._asking(name, writing=True):
                self.client.pipe_file(self._full(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._asking(name):
            self.client.rm_file(self._full(name))

    def link(self, name: str, other: str) -> None:
        if self.exists(other):
            return
        with self._asking(name):
            self.client.cp_file(self._full(name), self._full(other))  # by the store itself; nothing travels

    def draft(self, name: str) -> Path:
        descriptor, path = tempfile.mkstemp(prefix=self._drafts, suffix=".tmp")
        os.close(descriptor)
        return Path(path)

    def put_file(self, name: str, path: Path) -> None:
        with self._asking(name, writing=True):
            # one PUT, or a multipart upload, which is as invisible until it is completed
            self.client.put_file(str(path), self._full(name))
        path.unlink()

    def remove_temporary_files(self) -> None:
        for path in Path(tempfile.gettempdir()).glob(f"{self._drafts}*.tmp"):
            with suppress(OSError):  # another user's
                path.unlink()

    def remove_empty_folders(self) -> None:
        """Do nothing: an object store has no folders."""


def open_storage(place: str | Path | Storage) -> Storage:
    """Return the storage at a folder's path or a URL. Raises ConfigError for files and URLs of other kinds."""
    if isinstance(place, Storage):
        return place
    if isinstance(place, str):
        if match := URL.fullmatch(place):
            return _object_store(place, match["protocol"], match["path"])
        if "://" in place or HALF_URL.fullmatch(place):
            raise ConfigError(f"{place!r} is neither a folder nor the URL of an object store, such as s3://bucket/name")
    elif place.parts and place.parts[0].removesuffix(":") in PACKAGES and place.parts[0].endswith(":"):
        raise ValueError(f"{place} was a URL until somebody made a path of it")  # which would be a folder named s3:
    if os.path.isfile(place):
        raise ConfigError(f"{place} is a file, not a folder. Choose another one")
    return LocalFolder(place)


def _cannot_read(where: str, error: OSError) -> ResourceError:
    reason = error.strerror or error
    return ResourceError(
        f"{where} cannot be read: {reason}. Check the disk, the network and the permissions; run again"
    )


def _behind_the_end(error: Exception) -> bytes:
    """Return the nothing that a range holds which starts after the end of an object; raise other errors."""
    if "InvalidRange" in str(error) or "not satisfiable" in str(error):
        return b""
    raise error


def _object_store(text: str, protocol: str, path: str) -> ObjectStore:
    if protocol not in PACKAGES:
        raise ConfigError(
            f"{text}: cannot read {protocol} URLs. Give a folder or an object store ({', '.join(PACKAGES)}), "
            "for example s3://bucket/name"
        )
    if not path.strip("/"):
        raise ConfigError(f"{text}: the bucket is missing. Write {protocol}://BUCKET/NAME")
    return ObjectStore(text)


def absolute_place(place: str | Path) -> str:
    """Return a place that means the same in another working directory: an absolute path, or the URL itself."""
    storage = open_storage(place)
    return str(Path(storage.place).absolute()) if storage.is_local else storage.place

"""A real S3 server on this machine (moto's), for the tests of object stores."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Serve S3 with one bucket, and point this process and its children to it; yields the endpoint."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    S3FileSystem.clear_instance_cache()
    try:
        S3FileSystem().mkdir(bucket)
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        S3FileSystem.clear_instance_cache()
        os.environ.clear()
        os.environ.update(before)
        server.stop()


class StallingProxy:
    """Forwards one server's port, but after ``limit`` bytes from a client it keeps the rest to itself."""

    def __init__(self, endpoint: str, limit: int) -> None:
        self.host, _, port = endpoint.removeprefix("http://").partition(":")
        self.port, self.limit = int(port), limit
        self.stalled, self._ended = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Drop all connections, as a network does when its host has died."""
        self._ended.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection((self.host, self.port))
            for source, target, limit in ((client, server, self.limit), (server, client, None)):
                threading.Thread(target=self._forward, args=(source, target, limit), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        with source, target:
            while data := source.recv(1 << 16):
                if limit is not None and passed + len(data) > limit:
                    target.sendall(data[: limit - passed])
                    self.stalled.set()
                    self._ended.wait()
                    return
                target.sendall(data)
                passed += len(data)

"""The passes on Ray Data: shards with missing layers go to pools of actors that compute and commit them.

The only module of ``prep`` that imports Ray. One row of the data set is one shard: rows carry names and recipes, never
pixels; actors read and write the shared output. Which layers go together, on what and on how many actors is decided in
``prep/passes/placement.py``. An actor supervises a child process that computes (``prep/passes/supervisor.py``), so a
sample cannot end an actor: when one dies, somebody killed it or its node has gone, and its shards start again
elsewhere.

``from_items`` needs no reading tasks, so pools may take every CPU (a pool that shares CPUs with readers can stall).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from nanodit.console import say, waiting
from nanodit.errors import ConfigError, NanoditError, ResourceError, first_line, resource_error
from nanodit.place import PROJECT, hides
from nanodit.posix import resource
from nanodit.storage import absolute_place
from prep.captions.base import is_loopback
from prep.config import PrepConfig
from prep.images.scan import describe_file, read_all
from prep.passes.layers import ShardTask
from prep.passes.nodes import Node, local_gpus, nodes_from_ray
from prep.passes.placement import Pass
from prep.passes.ray_watch import RayPlace, ended_with_ray
from prep.passes.supervisor import ERRORS, Supervisor

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # said aloud, so that a later cluster on this machine is no surprise

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

EXECUTOR_THREADS = "StreamingExecutor-"
JOB_END = 2.5  # seconds; `ray job stop` kills after three
MAX_DEATHS = 3  # of actors or nodes in a row, with no shard finished between them
AGAIN = "Run the same command again: finished units are kept"
NAMED = 5
BLOCK = 500  # files that a task hashes
TASKS = 2048  # shards that are handed to Ray at a time: 64 MB with all their sources and captions
CONNECT_TIMEOUT = 10.0  # seconds
SOCKET_ROOM = 35  # letters: /session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1 and more comes behind
OPEN_FILES, FEWEST_FILES = 4096, 512  # Ray's own advice is 65,536; a node of its own takes about 300
MIN_MEMORY = 4 << 30  # bytes a worker may always use: what the production encoders need on a CPU
MEMORY_SHARE = 0.8  # of a machine, for all its workers together
# what Ray raises when an actor, its node or a result on that node has gone
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)


@contextmanager
def ray_session(again: str = AGAIN, less: str = "lower workers") -> Iterator[None]:
    """Use the Ray that is running in this process, else join ``RAY_ADDRESS``, else start one for this run alone.

    Ends the process with exit code 4 where Ray itself dies meanwhile; ``again`` and ``less`` are of what is said then
    (``prep/passes/ray_watch.py``).
    """
    if ray.is_initialized():
        yield
        return
    try:
        with ended_with_ray(_ray_place, again, less) as started:
            with _sigterm_kept():
                _begin()
            started()
            try:
                yield
            finally:
                end_jobs()
    finally:
        ray.shutdown()


def _begin() -> None:
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    allow_open_files()
    if (address := os.environ.get("RAY_ADDRESS", "local")) not in ("", "local"):
        address = cluster_address(address)
        with waiting(f"joining Ray at {address}"), _away():
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError) as error:
                raise ResourceError(f"RAY_ADDRESS {address}: no cluster can be joined: {first_line(error)}") from error
    else:
        with waiting("starting Ray on this machine"), _away(), _loopback():
            resources = {"vram_gb": sum(gpus)} if (gpus := local_gpus()) else {}
            with _starting():
                ray.init(
                    address="local", include_dashboard=False, resources=resources, _temp_dir=temporary_folder(), **quiet
                )
        protect_token(Path.home() / ".ray" / "auth_token")
        if not is_loopback(here := ray.util.get_node_ip_address()):
            say(f"Ray {ray.__version__} listens at {here}, not on loopback alone: keep this machine behind a firewall")


def _ray_place() -> RayPlace | None:
    """Return where the Ray of this process listens, None before its node has begun to start."""
    if (node := ray._private.worker._global_node) is None:
        return None
    return RayPlace(node.raylet_socket_name, node.gcs_address, node.get_logs_dir_path(), own=node.is_head())


@contextmanager
def _starting() -> Iterator[None]:
    """Say what kept Ray from starting here: a process of it that was killed, or a machine too busy for its limits."""
    try:
        yield
    except Exception as error:
        # most of what Ray raises here has no class of its own
        if type(error) not in (Exception, RuntimeError, ConnectionError, TimeoutError) and not isinstance(
            error, ray.exceptions.RayError
        ):
            raise
        raise ResourceError(
            f"Ray could not be started on this machine: {first_line(error)}. Where no process of it was killed and "
            "there is memory left, the machine may be too busy. Run the same command again"
        ) from error


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Let SIGTERM mean what it did before: ``ray.init`` makes it end the process with 1 or 15, from its begin on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as asked:  # by one of Ray's handlers
        raise KeyboardInterrupt from asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def cluster_address(given: str) -> str:
    """Return the HOST:PORT of the cluster that ``RAY_ADDRESS`` names, where somebody listens.

    ``auto`` is the one that ``ray start`` began on this machine, never one that another program began for itself alone
    and ends with itself. Raises ConfigError for what is no such address, ResourceError where nobody listens.
    """
    if given.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {given}: is of Ray Client, which cannot run a pass. Give HOST:6379 of the head, from a "
            "machine of the cluster, or submit the command with: ray job submit"
        )
    address = given
    if given == "auto":
        address = ray._private.utils.read_ray_address()
        if not address:
            raise ConfigError(
                "RAY_ADDRESS auto: no cluster was started on this machine with `ray start`, or with a --temp-dir. "
                "Unset it to start one for this command alone, or give HOST:6379"
            )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"RAY_ADDRESS {given}: is no HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"RAY_ADDRESS {given}: nobody answers at {address} ({first_line(error)}). Start the cluster, correct the "
            "address, or unset it to work on this machine alone"
        ) from error
    return address


def temporary_folder() -> str | None:
    """Return where Ray keeps its sockets, whose paths may have 107 letters; None: where it does by itself.

    Raises ConfigError where no folder with a short name can be written.
    """
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    for folder in dict.fromkeys((wanted, "/tmp", "/dev/shm", "/var/tmp")):
        if len(os.fsencode(os.path.abspath(folder))) <= SOCKET_ROOM and os.access(folder, os.W_OK | os.X_OK):
            return None if folder == wanted else os.path.join(folder, f"ray-{os.getuid()}")
    raise ConfigError(
        f"Ray's sockets need a folder with a short name that can be written; {wanted} is not one. Set RAY_TMPDIR to "
        f"one of at most {SOCKET_ROOM} letters"
    )


def allow_open_files() -> None:
    """Let this process, and what it starts, open as many files as Ray needs, as far as the system allows it.

    Raises ResourceError where that is too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if wanted < FEWEST_FILES:
        raise ResourceError(
            f"this shell lets a process open {soft} files, and Ray needs {FEWEST_FILES}. Raise the limit: ulimit -n "
            f"{OPEN_FILES}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _away() -> AbstractContextManager[None]:
    """Leave a working directory that has, say, a ``train.py``: Ray puts the one it starts in first on workers' path.

    Only in the main thread, when no other one reads relative paths.
    """
    alone = threading.current_thread() is threading.main_thread()
    return chdir(PROJECT) if alone and hides(os.getcwd()) else nullcontext()


@contextmanager
def _loopback() -> Iterator[None]:
    """Let the Ray that starts here listen on the loopback address alone, as Ray does where it knows no clusters.

    Its processes listen on all interfaces unless the address of their node is loopback, and ``_node_ip_address`` of
    ``ray.init`` takes loopback for "one that others reach" unless this constant, set on Windows and macOS, is False.
    """
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def end_jobs() -> None:
    """Wait for Ray Data's threads to end: one that asks Ray for something after its shutdown ends this process."""
    gc.collect()  # a job ends when nobody holds its iterator
    for thread in threading.enumerate():
        if thread.name.startswith(EXECUTOR_THREADS):
            thread.join(timeout=JOB_END)


def protect_token(path: Path) -> None:
    """Let nobody else read the token that Ray made for its clusters on this machine; Ray leaves it readable."""
    if path.exists() and path.stat().st_uid == os.getuid():
        path.chmod(0o600)


def cluster_nodes() -> list[Node]:
    """Return the living nodes of the running Ray."""
    return nodes_from_ray(ray.nodes(), ray.get_runtime_context().get_node_id())


def on_every_node(function: Callable[..., Any], *arguments: Any, timeout: float = 30.0) -> dict[str, Any]:
    """Call a function of a module on every node; node id -> what it returned, or the exception.

    A node that does not answer within ``timeout`` seconds gives a TimeoutError, one that has gone meanwhile nothing.
    Takes no CPUs, so it never waits for a pass to end.
    """
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    answers = {}
    for node in cluster_nodes():
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        answers[node.id] = remote.options(scheduling_strategy=strategy).remote(*arguments)
    deadline = time.monotonic() + timeout
    results: dict[str, Any] = {}
    for node, answer in answers.items():
        try:
            results[node] = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            results[node] = TimeoutError(f"no answer within {timeout:g} seconds")
        except Exception as error:  # whatever it raised there is this node's answer
            results[node] = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if any(isinstance(result, BaseException) for result in results.values()):
        there = {node.id for node in cluster_nodes()}  # Ray notices after seconds that a node has gone
        results = {node: result for node, result in results.items() if node in there}
    return results


def read_sources(folder: str, names: Sequence[str], max_pixels: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Hash files below ``folder`` and read their headers on all nodes; yields name -> plain values, block by block.

    What a node could not read or would refuse is left out: it may have another folder there. A block whose node dies is
    read on another one.
    """
    blocks = [{"names": json.dumps(names[start : start + BLOCK])} for start in range(0, len(names), BLOCK)]
    quiet_data()
    rows = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    for row in rows.map(partial(_read_block, absolute_place(folder), max_pixels), num_cpus=1).iter_rows():
        yield json.loads(row["found"])


def _read_block(folder: str, max_pixels: int, row: dict[str, str]) -> dict[str, str]:
    names = json.loads(row["names"])
    found = zip(names, read_all(names, lambda name: describe_file(Path(folder), name, max_pixels)))
    return {
        "found": json.dumps(
            {name: value for name, value in found if "key" in (value if isinstance(value, dict) else ())}
        )
    }


def run_pass(config: PrepConfig, step: Pass, tasks: list[ShardTask]) -> Iterator[list[dict[str, Any]]]:
    """Compute and commit the tasks; yields what each shard took as it is finished (see ``Supervisor.run``).

    When an actor or a node dies, the shards that are not finished start again without what they have committed. Raises
    ResourceError when that happens too often in a row, else the error of the first shard that could not be computed;
    what was committed stays.
    """
    waiting = {(task.bucket, task.shard): task for task in tasks}
    deaths = 0
    while deaths < MAX_DEATHS:
        failed = None
        try:
            for row in _results(config, step, list(islice(waiting.values(), TASKS))):
                if row["error"]:
                    failed = row
                    break
                deaths = 0
                del waiting[row["bucket"], row["shard"]]
                yield json.loads(row["done"])
            if failed is not None:
                # raised here, where no frame holds the job's iterator any more: dropping that is what ends the job
                raise ERRORS.get(failed["exit_code"], NanoditError)(failed["error"])
            if not waiting:
                return
        except LOST:
            deaths += 1
            say(f"an actor was killed, or died with its node; {len(waiting)} shards are not finished and start again")
    names = ", ".join(f"bucket_{bucket}/shard-{shard:06d}" for bucket, shard in list(waiting)[:NAMED])
    raise ResourceError(
        f"{MAX_DEATHS} actors or nodes died one after another, with {len(waiting)} shards not finished ({names}, ...). "
        "The usual cause is memory: lower workers or the batch sizes and run again; finished shards are kept"
    )


def quiet_data() -> None:
    """Let Ray Data show no progress and log nothing: its errors come to us as exceptions."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _results(config: PrepConfig, step: Pass, tasks: list[ShardTask]) -> Iterator[dict[str, Any]]:
    quiet_data()
    shards = ray.data.from_items([{"task": task.to_json()} for task in tasks], override_num_blocks=len(tasks))
    actors = min(step.actors, len(tasks))
    # no node joins a Ray of one's own
    most = min(max(step.actors, step.max_actors), len(tasks)) if os.environ.get("RAY_ADDRESS") else actors
    with warnings.catch_warnings():
        # max_restarts has no named parameter yet; without it Ray would wait for a dead node's actors for ever
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = shards.map_batches(
            actor_class(config, step),
            batch_size=1,
            # two tasks in flight: one at work and one waiting, so that no actor hoards shards at the end
            compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=most, max_tasks_in_flight_per_actor=2),
            max_restarts=0,
            **step.demands(),
        )
    return results.iter_rows()


def with_absolute_places(config: PrepConfig) -> PrepConfig:
    """Return the config for actors, which may have another working directory."""
    places = {"source": str(Path(config.source).absolute()), "output": absolute_place(config.output)}
    return config.model_copy(update=places)


def actor_class(config: PrepConfig, step: Pass) -> type:
    """Return the class that Ray Data runs in its actors; the config travels with it."""
    config = with_absolute_places(config)

    class LayerActor:
        def __init__(self) -> None:
            self.supervisor = Supervisor(config, step.device, memory_limit(config, step), step.threads)

        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            task = ShardTask.from_json(str(batch["task"][0]))
            done, error, exit_code = [], "", 0
            try:
                done = self.supervisor.run(task)
            except Exception as failure:
                known = failure if isinstance(failure, NanoditError) else resource_error(failure)
                if known is None:  # not for the user: a defect, which ends the job
                    raise
                error, exit_code = str(known), known.exit_code
            answer = {"bucket": task.bucket, "shard": task.shard, "done": json.dumps(done)}
            return {name: [value] for name, value in (answer | {"error": error, "exit_code": exit_code}).items()}

    return LayerActor


def memory_limit(config: PrepConfig, step: Pass) -> int:
    """Bytes of memory that a worker on this machine may use; 0 for no limit, because CUDA maps more than it uses."""
    if step.device != "cpu":
        return 0
    if config.memory_limit_gb:
        return int(config.memory_limit_gb * (1 << 30))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(MIN_MEMORY, int(MEMORY_SHARE * total / min(step.actors, os.cpu_count() or 1)))

"""``prep doctor``: checks for everything that would stop or slow a run, with one fix for each finding.

Nothing is changed, downloaded or started. The checks run side by side, each with a time limit, so that a slow network
or a sick GPU costs seconds. With ``RAY_ADDRESS`` every node of that cluster is examined, without it this machine alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from nanodit.console import say
from nanodit.errors import NanoditError
from prep.captions.base import ServerFacts
from prep.captions.config import CaptionConfig, CaptionHost
from prep.config import PrepConfig
from prep.doctor.check import (
    RESOURCE,
    SETUP,
    Check,
    exit_code,
    fail,
    ok,
    show,
    summary,
    to_json,
    warn,
    without_secrets,
)
from prep.doctor.models import (
    NoAnswer,
    check_model,
    check_network,
    encoder_names,
    examine_server,
    lpips_checks,
    server_checks,
)
from prep.doctor.node import GCS_PORT, examine_node, first_line
from prep.doctor.places import cache_check, place_checks, project_check, store_checks
from prep.doctor.rules import Needs, cluster_checks, counted, named, needs_of, node_checks
from prep.encoders.registry import NETWORKS
from prep.passes.cost import foreseen_times
from prep.passes.nodes import Node, local_node
from prep.passes.placement import plan_passes

SAMPLES = 1000  # of which the times of the passes are
LIMIT = 14.0  # seconds for everything
CONNECT_SECONDS = 3.0
JOIN_SECONDS = 7.0  # to import Ray and be let in
NODE_SECONDS = 12.0  # for every node to answer
CAPTION_SECONDS = 9.0  # the name, the model, and two more questions
Checks = list[Check]


@dataclass
class CheckTask:
    """Some checks that run in a thread of their own; ``name`` stands for them if they do not end in time."""

    name: str
    function: Callable[[], Iterable[Check]]
    checks: Checks = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start the checks in a thread that does not keep the process alive."""
        threading.Thread(target=self._run, daemon=True, name=f"doctor-{self.name}").start()

    def result(self, deadline: float) -> Checks:
        """Return the checks there are by ``deadline`` (a ``time.monotonic``), and a warning if more were to come."""
        if self.done.wait(max(0.0, deadline - time.monotonic())):
            return self.checks
        fix = "check the network, the disk or the driver behind it, and run this again"
        return [*self.checks, warn(self.name, "could not be checked in time", fix)]

    def _run(self) -> None:
        try:
            for check in self.function():
                self.checks.append(check)
        except NanoditError as error:
            found, _, fix = str(error).partition(". ")
            self.checks.append(fail(self.name, error.exit_code, found, fix or "correct the config"))
        except Exception as error:  # one broken check must not hide what the others found
            found = f"could not be checked: {type(error).__name__}: {first_line(str(error))}"
            self.checks.append(warn(self.name, found, "the other checks are valid; please report this one"))
        self.done.set()


def doctor(config: PrepConfig, as_json: bool) -> int:
    """Print what was found and what to do, and return the exit code.

    0 when nothing FAILs; else the lowest code of the failures: 2 something must be installed, set or permitted, 3 data
    or files are missing, 4 a resource is lacking. With ``as_json`` stdout is one document: ``schema`` (1), ``status``,
    ``exit_code`` and ``checks``, a list of ``name``, ``node`` ("" for the whole run), ``status``, ``found``, ``fix``.
    """
    start = time.monotonic()
    found: Checks = []
    # other modules print progress to stdout, which belongs to the document here
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        address = os.environ.get("RAY_ADDRESS", "")
        where = f"the Ray cluster at {address}" if address else "this machine"
        if not as_json:
            say(f"prep doctor: {where}, {config.encoders} encoders, captions from {config.captions.backend}")
        tasks = tasks_for(config, address)
        for task in tasks:
            task.start()
        for task in tasks:
            for check in map(without_secrets, task.result(start + LIMIT)):
                found.append(check)
                if not as_json:
                    show(check)
    if as_json:
        print(to_json(found), flush=True)
    else:
        say(summary(found, time.monotonic() - start))
    return exit_code(found)


def tasks_for(config: PrepConfig, address: str) -> list[CheckTask]:
    """Return everything to check, in the order in which it is shown."""
    needs = needs_of(config)
    machines = CheckTask(
        "node", lambda: cluster(needs, address, config) if address else node_checks(examine_node(), needs, False)
    )
    placed = [] if address else [CheckTask("passes", lambda: [pass_check(config, [local_node()])])]
    models, names = [], encoder_names(config)
    for part, name in names.items():
        check = check_network if part in NETWORKS else check_model
        models.append(CheckTask(part, lambda part=part, name=name, check=check: [check(config, part, name)]))
    places = [CheckTask("dataset", lambda: place_checks(config)), CheckTask("output", lambda: store_checks(config))]
    if any(names.values()):
        models.append(CheckTask("model_cache", lambda: [cache_check()]))
    models.append(CheckTask("lpips", lpips_checks))
    return [
        CheckTask("nanodit", lambda: [project_check()]),
        machines,
        *placed,
        *models,
        *caption_tasks(config),
        *places,
    ]


def caption_tasks(config: PrepConfig) -> list[CheckTask]:
    """Return the checks of the servers that captions come from; none for sidecars, nor of those that a run starts."""
    if "text" not in config.active_layers or not config.captions.servers:
        return []
    return [CheckTask(config.captions.backend, lambda: caption_servers(config.captions))]


def caption_servers(captions: CaptionConfig) -> Checks:
    """Ask all hosts at once, and compare what they say."""
    answers: dict[str, ServerFacts | NoAnswer] = {}

    def ask(host: CaptionHost) -> None:
        answers[host.url] = examine_server(host, captions)

    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in captions.servers]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + CAPTION_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = NoAnswer(f"no answer within {CAPTION_SECONDS:.0f} s")
    return server_checks({host.url: answers.get(host.url, silent) for host in captions.servers}, captions)


def pass_check(config: PrepConfig, nodes: Sequence[Node]) -> Check:
    """Say how long each pass takes on the devices that it is placed on."""
    try:
        passes, remarks = plan_passes(config, nodes)
    except NanoditError as error:
        found, _, fix = str(error).partition(". ")
        return fail("passes", error.exit_code, found, fix)
    found = f"{SAMPLES:,} images: {', then '.join(foreseen_times(config, passes, SAMPLES))} (estimates)"
    slow = [remark for remark in remarks if "runs on CPUs" in remark]
    if not slow:
        return ok("passes", found)
    fix = "lower its batch_size, or free the card; `nanodit prep plan` has the times for all images"
    return warn("passes", f"{found}; {'; '.join(slow)}", fix)


def cluster(needs: Needs, address: str, config: PrepConfig) -> Iterator[Check]:
    """Examine every node of the running Ray, or this machine alone where there is none; checks name the node."""
    refusal, examination = _unreachable(address), ClusterExamination()
    if refusal is None:
        examination.start()
        if not examination.joined.wait(JOIN_SECONDS):
            found = f"a server listens at {address}, but has not let this process in after {JOIN_SECONDS:.0f} s"
            fix = "copy the head's token (~/.ray/auth_token, or RAY_AUTH_TOKEN); on the head `ray status` must answer"
            refusal = fail("ray", SETUP, found, fix)
        else:
            examination.join()  # nodes have a time limit of their own
    if examination.error is not None:
        fix = "use the cluster's Python and Ray (`ray status` there), and the head's token in ~/.ray/auth_token"
        refusal = fail("ray", SETUP, f"cannot use {address}: {first_line(str(examination.error))}", fix)
    if refusal:
        yield refusal
        yield from node_checks(examine_node(), needs, False)
        return
    machines = examination.machines
    yield ok("ray", f"{counted(examination.nodes, 'node')} on {counted(len(machines), 'machine')}")
    yield from cluster_checks(machines, needs, examination.before, examination.after)
    yield pass_check(config, examination.placed)
    for name, facts in machines.items():
        if not isinstance(facts, BaseException):
            yield from (replace(check, node=name) for check in node_checks(facts, needs, True))


class ClusterExamination(threading.Thread):
    """A thread that joins Ray and examines its nodes, because Ray tries for a minute where it is not let in.

    ``joined`` is set when Ray was joined, or when ``error`` is set; ``machines`` are the answers by name, and
    ``before`` and ``after`` the times around them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="doctor-ray")
        self.joined = threading.Event()
        self.error: Exception | None = None
        self.machines: dict[str, Any] = {}
        self.nodes, self.before, self.after = 0, 0.0, 0.0
        self.placed: list[Node] = []

    def run(self) -> None:
        """Join Ray and examine its nodes."""
        try:
            from prep.passes.ray_passes import cluster_nodes, on_every_node, ray_session

            logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it minds not being in the main thread
            with ray_session():
                self.joined.set()
                self.before = time.time()
                answers = on_every_node(examine_node, True, timeout=NODE_SECONDS)
                self.after = time.time()
                seen = {node: facts for node, facts in answers.items() if isinstance(facts, dict)}
                self.placed = [
                    replace(node, ollama=node.id not in seen or seen[node.id]["ollama"]) for node in cluster_nodes()
                ]
                addresses = {node.id: node.address for node in self.placed}
            # a host with several GPUs may be several nodes of Ray, and counts once
            machines = {addresses.get(node, node[:8]): answer for node, answer in answers.items()}
            self.nodes, self.machines = len(answers), named(machines)
        except Exception as error:  # Ray has a class for each: other versions, a wrong token, no cluster
            self.error = error
        self.joined.set()


def _unreachable(address: str) -> Check | None:
    """Return a FAIL where nobody listens at ``address``; Ray itself would try for a minute."""
    if "://" in address or ":" not in address:  # "auto", "local", or a client's URL
        parts = urlsplit(address) if "://" in address else None
        host, port = (parts.hostname or "", parts.port) if parts else ("", None)
    else:
        host, _, digits = address.rpartition(":")
        port = int(digits) if digits.isdigit() else None
    if not host:
        return None
    try:
        socket.create_connection((host.strip("[]"), port or GCS_PORT), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        fix = "start it (`ray start --head`), correct RAY_ADDRESS, or unset it to use this machine alone"
        return fail("ray", RESOURCE, f"nothing listens at RAY_ADDRESS={address} ({error.strerror or error})", fix)
    return None

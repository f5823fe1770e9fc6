"""Rules for what the facts about machines mean for a run: pure functions of what ``examine_node`` returns."""

from __future__ import annotations

import ipaddress
import platform
import resource
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prep.captions.own_server import INSTALL, PROGRAM
from prep.captions.servers import SERVERS
from prep.config import PrepConfig
from prep.dataset.layers import ENCODER_LAYERS
from prep.doctor.check import RESOURCE, SETUP, Check, fail, ok, warn
from prep.doctor.node import DASHBOARD_PORT, GCS_PORT, first_line
from prep.passes.placement import memory_need, vram_need

GB = 1e9
SHM_SHARE, SHM_MOST = 0.3, 10 * GB  # what Ray wants of /dev/shm; with less it uses the disk (ray/_private/utils.py)
OPEN_FILES = 4096  # Ray's processes and their sockets
MEMORY_LEAST = 1 * GB
BF16_CAPABILITY = (8, 0)  # Ampere
CLOCK_SECONDS = 2.0
BUSY = "run this again when the machine is idle; if nothing changes, the GPU or its driver hangs: reboot"


# --- judging one machine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """The demands of a run on a machine: ``vram_gb`` by layer, ``memory_gb`` per worker on a CPU (0: not counted).

    ``workers`` is the number of actors, None for one per CPU; ``device`` is ``placement.device``. On CPUs ``slow``
    encoders take seconds an image. ``unloads``: the run asks the caption server to unload its model before encoders use
    its card. ``ollama``: the model that it captions with by servers that it starts itself, if any.
    """

    vram_gb: dict[str, float]
    memory_gb: float
    workers: int | None
    device: str
    slow: bool = True
    unloads: bool = False
    ollama: str = ""


def needs_of(config: PrepConfig) -> Needs:
    """Return the needs of a config."""
    encoders = [layer for layer in config.active_layers if layer in ENCODER_LAYERS]
    return Needs(
        {layer: vram_need(config, [layer]) for layer in encoders},
        memory_need(config, encoders),
        config.workers,
        config.placement.device,
        slow=bool(encoders) and config.encoders != "demo",
        unloads=config.captions.generated and SERVERS[config.captions.backend].unloads,
        ollama=config.captions.model if "text" in config.active_layers and config.captions.own_servers else "",
    )


def node_checks(facts: dict[str, Any], needs: Needs, joined: bool) -> list[Check]:
    """Return the checks of one machine's facts; ``joined`` when the run uses a Ray that is already running."""
    return [
        _packages(facts),
        *_gpus(facts, needs, joined),
        *_ollama(facts, needs, joined),
        _onnxruntime(facts),
        _memory(facts, needs),
        _shm(facts),
        _open_files(facts),
        *_network(facts, joined),
        _tokens(facts),
    ]


def _packages(facts: dict[str, Any]) -> Check:
    if facts["unmet"]:
        return fail(
            "packages",
            SETUP,
            f"Python {facts['python']} lacks {', '.join(facts['unmet'])}",
            "run `make install`, or `pip install -e .` in this clone",
        )
    packages = facts["packages"]
    names = [f"{name} {packages[name]}" for name in ("ray", "torch", "transformers") if name in packages]
    return ok("packages", ", ".join([f"Python {facts['python']}", *names]))


def _gpus(facts: dict[str, Any], needs: Needs, joined: bool) -> list[Check]:
    probe, gpus = facts["probe"], facts["gpus"]
    if facts["gpu_error"]:
        fix = "reboot, or reload the driver (`sudo dmesg | grep -i nvrm` says why); placement.device=cpu works without"
        return [fail("gpu", RESOURCE, facts["gpu_error"], fix)]
    if "torch" not in probe:
        reason = probe.get("torch_error") or probe["end"] or "no answer"
        if probe["late"]:
            return [warn("torch", reason, BUSY)]
        return [fail("torch", SETUP, f"torch cannot be imported: {reason}", "pip install --force-reinstall torch")]
    if not gpus:
        return [_no_gpu(facts, needs, joined)]
    checks = [
        ok("gpu", f"{gpu['name']}{_size(gpu['memory'])}, driver {gpu['driver']}, capability {gpu['capability']}")
        for gpu in gpus
    ]
    return [*checks, _cuda(facts), _bf16(gpus), *(_vram(gpu, facts, needs) for gpu in gpus), _compiler(facts)]


def _ollama(facts: dict[str, Any], needs: Needs, joined: bool) -> list[Check]:
    if not needs.ollama:
        return []
    if facts["ollama"]:
        found = f"the run starts its own servers, and pulls {needs.ollama} into their store where it is not there"
        return [ok("ollama", found)]
    if joined:
        return [warn("ollama", f"no program {PROGRAM}: this machine writes no captions", INSTALL)]
    return [fail("ollama", SETUP, f"captions.hosts is auto, and there is no program {PROGRAM}", INSTALL)]


def _no_gpu(facts: dict[str, Any], needs: Needs, joined: bool) -> Check:
    found = f"no NVIDIA GPU; the encoders run on {facts['cpus']} CPU threads"
    driver = "if there is a card, install its driver (`nvidia-smi` must list it)"
    if needs.device == "cuda" and not joined:
        return fail(
            "gpu", RESOURCE, "no NVIDIA GPU, and placement.device is cuda", f"{driver}, or placement.device=auto"
        )
    if joined:
        return ok("gpu", "no NVIDIA GPU; this node decodes, and encodes what fits no card")
    if not needs.slow or needs.device == "cpu":
        return ok("gpu", found)
    fix = (
        f"{driver}; or add a machine that has one (README, A cluster). `nanodit prep plan` says how long it takes "
        "without"
    )
    return warn("gpu", f"{found}, which takes seconds per image", fix)


def _size(amount: float | None) -> str:
    return "" if amount is None else f", {amount / GB:.1f} GB"


def _cuda(facts: dict[str, Any]) -> Check:
    probe = facts["probe"]
    if not probe["cuda"]:
        return fail(
            "cuda",
            SETUP,
            f"torch {probe['torch']} is built without CUDA and cannot use the GPU",
            "pip uninstall -y torch torchvision, then pip install torch torchvision",
        )
    if probe["late"] and "onnxruntime" not in probe:
        return warn("cuda", f"torch {probe['torch']} on the GPU: {probe['end']}", BUSY)
    if reason := probe.get("torch_error"):
        return fail(
            "cuda",
            RESOURCE,
            f"torch {probe['torch']} for CUDA {probe['cuda']} cannot use the GPU: {reason}",
            f"update the NVIDIA driver (here {facts['gpus'][0]['driver']}; CUDA 13 needs 580 and a card of capability "
            "7.5 or more), or install a torch for the CUDA that `nvidia-smi` prints (pytorch.org/get-started)",
        )
    works = f"torch {probe['torch']} for CUDA {probe['cuda']} computes on {len(facts['gpus'])} GPU"
    return ok("cuda", f"{works}; `nanodit train gpu-check` tells how well")


def _bf16(gpus: list[dict[str, Any]]) -> Check:
    old = [gpu for gpu in gpus if tuple(map(int, gpu["capability"].split("."))) < BF16_CAPABILITY]
    if not old:
        return ok("bf16", "bfloat16 in hardware")
    names = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in old)
    fix = "nothing to fix: features agree within rounding; expect less speed, or lower t5 and dino batch_size"
    return warn("bf16", f"{names}: no bfloat16 in hardware, so encoders are slower and take more memory", fix)


def _vram(gpu: dict[str, Any], facts: dict[str, Any], needs: Needs) -> Check:
    free, held = gpu["free"], facts["ollama_memory"]
    if free is None:
        return ok("vram", "shared with the CPU's memory")
    total = "" if gpu["memory"] is None else f" of {gpu['memory'] / GB:.1f}"
    found = f"{free / GB:.1f}{total} GB free" + (f"; Ollama holds {held / GB:.1f} GB" if held else "")
    if held and needs.unloads:
        found, free = f"{found}, and is asked to unload before encoders run", free + held
    large = {layer: need for layer, need in needs.vram_gb.items() if need * GB > free}
    if not large:
        return ok("vram", found)
    wanted = ", ".join(f"{layer} {need:g} GB" for layer, need in large.items())
    stop = "`ollama stop MODEL` before the encoders run, or close" if held else "close"
    fix = f"{stop} what else uses the card (`nvidia-smi` lists it), or lower the batch sizes"
    return warn("vram", f"{found}, too little for {wanted}", fix)


def _compiler(facts: dict[str, Any]) -> Check:
    if facts["compiler"]:
        return ok("compiler", "a C compiler and Python.h, which torch.compile needs")
    return warn(
        "compiler",
        "no C compiler or no Python.h: prep works without, but torch.compile in training fails",
        "apt install build-essential python3-dev (or your system's equivalent)",
    )


def _onnxruntime(facts: dict[str, Any]) -> Check:
    probe, runtimes, gpus = facts["probe"], facts["runtimes"], bool(facts["gpus"])
    wanted = "onnxruntime-gpu" if platform.system() == "Linux" and platform.machine() == "x86_64" else "onnxruntime"
    reinstall = f"pip uninstall -y {' '.join(runtimes) or 'onnxruntime'}, then pip install {wanted}"
    if len(runtimes) > 1:
        return fail("onnxruntime", SETUP, f"{' and '.join(runtimes)} overwrite each other and lose CUDA", reinstall)
    if "provider" not in probe:
        reason = probe.get("onnxruntime_error") or probe["end"] or "no answer"
        if probe["late"]:
            return warn("onnxruntime", reason, BUSY)
        return fail("onnxruntime", SETUP, f"a session cannot be created: {reason}", reinstall)
    found = f"{runtimes[0] if runtimes else 'onnxruntime'} {probe['onnxruntime']} computes on {probe['provider']}"
    if gpus and probe["provider"] != "CUDAExecutionProvider":
        return fail("onnxruntime", SETUP, f"{found}, although CUDA was asked for: poses would use the CPU", reinstall)
    return ok("onnxruntime", found)


def _memory(facts: dict[str, Any], needs: Needs) -> Check:
    free, workers, each = facts["memory_free"], needs.workers or facts["cpus"], needs.memory_gb * GB
    found = f"{free / GB:.1f} of {facts['memory'] / GB:.1f} GB free, {facts['cpus']} CPU threads"
    if free < max(MEMORY_LEAST, each):
        need = max(MEMORY_LEAST, each) / GB
        return fail(
            "memory", RESOURCE, f"{found}; one worker takes {need:.1f} GB", "close other programs, or add memory"
        )
    if not facts["gpus"] and free < workers * each:
        fix = f"set workers={int(free / each)}, or close other programs"
        return warn("memory", f"{found}; {workers} workers may take {workers * each / GB:.0f} GB", fix)
    return ok("memory", found)


def _shm(facts: dict[str, Any]) -> Check:
    free, need = facts["shm_free"], min(SHM_SHARE * facts["memory"], SHM_MOST)
    if free is None:
        return ok("shared_memory", "not used on this system")
    if free >= need:
        return ok("shared_memory", f"{free / GB:.1f} GB free in /dev/shm")
    return warn(
        "shared_memory",
        f"{free / GB:.2f} GB free in /dev/shm; Ray wants {need / GB:.1f} and would use the disk",
        f"in Docker start with --shm-size={need / GB * 1.1:.0f}g; otherwise delete files in /dev/shm",
    )


def _open_files(facts: dict[str, Any]) -> Check:
    soft, hard = facts["open_files"]
    unlimited = hard == resource.RLIM_INFINITY
    if unlimited or hard >= OPEN_FILES:
        return ok("open_files", f"limit {soft}, which Ray may raise to {'any number' if unlimited else hard}")
    return warn(
        "open_files",
        f"limit {hard}: many workers may fail with `too many open files`",
        f"ulimit -n {16 * OPEN_FILES}, or `nofile` in /etc/security/limits.conf (Docker: --ulimit nofile=65536)",
    )


def _network(facts: dict[str, Any], joined: bool) -> list[Check]:
    gcs, dashboard = (facts["listening"].get(str(port), []) for port in (GCS_PORT, DASHBOARD_PORT))
    checks = []
    if gcs and not joined:
        checks.append(
            warn(
                "ports",
                f"{GCS_PORT} is taken on {', '.join(gcs)} (a Ray cluster, or Redis), and RAY_ADDRESS is not set",
                "export RAY_ADDRESS=auto to use that cluster; without it prep run starts a Ray of its own",
            )
        )
    else:
        checks.append(ok("ports", f"{GCS_PORT} {'in use by Ray' if gcs else 'free'}"))
    public = [address for address in dashboard if not ipaddress.ip_address(address).is_loopback]
    if public:
        checks.append(
            warn(
                "dashboard",
                f"listens on {', '.join(public)}:{DASHBOARD_PORT}: anyone who reaches it can run programs here",
                "restart with `ray start --head --dashboard-host=127.0.0.1`, and reach it through an SSH tunnel",
            )
        )
    elif facts["auth_mode"] == "disabled":
        checks.append(
            warn(
                "dashboard",
                "RAY_AUTH_MODE=disabled: anyone who reaches Ray's ports can run programs here",
                "export RAY_AUTH_MODE=token on every node, and restart Ray",
            )
        )
    else:
        where = (
            f"on the loopback address ({DASHBOARD_PORT})" if dashboard else f"not running ({DASHBOARD_PORT} is free)"
        )
        checks.append(ok("dashboard", where))
    return checks


def _tokens(facts: dict[str, Any]) -> Check:
    files = facts["open_token_files"]
    if not files:
        return ok("token_files", "none that other users can read")
    return warn("token_files", f"{', '.join(files)}: other users can read it", f"chmod 600 {' '.join(files)}")


# --- judging the cluster ----------------------------------------------------------------------------------------------


def named(machines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers by the hosts' names, with the address where two hosts share a name."""
    hosts = {
        address: address if isinstance(facts, BaseException) else facts["host"] for address, facts in machines.items()
    }
    shared = {host for host, times in Counter(hosts.values()).items() if times > 1}
    return {
        f"{hosts[address]} ({address})" if hosts[address] in shared else hosts[address]: facts
        for address, facts in machines.items()
    }


def cluster_checks(machines: Mapping[str, Any], needs: Needs, before: float, after: float) -> list[Check]:
    """Check that the machines of a cluster agree, and have a GPU among them.

    The values are facts of ``examine_node``, or the exception that was raised instead; ``before`` and ``after`` are
    this machine's times around the examination.
    """
    answers = {name: facts for name, facts in machines.items() if not isinstance(facts, BaseException)}
    checks = []
    for name, error in machines.items():
        if isinstance(error, BaseException):
            found = f"cannot be examined: {first_line(str(error) or type(error).__name__)}"
            fix = "see `ray status` and that machine; restart it with `ray start --address=HEAD:6379`"
            checks.append(replace(fail("node", RESOURCE, found, fix), node=name))
    if not answers:
        return checks
    if needs.device != "cpu" and needs.slow and not any(facts["gpus"] for facts in answers.values()):
        found = "no machine has an NVIDIA GPU: the encoders run on CPUs, at seconds per image"
        fix = "add a machine that has one (README, A cluster). `nanodit prep plan` says how long it takes as it is"
        must = needs.device == "cuda"
        checks.append(fail("gpu", RESOURCE, found, fix) if must else warn("gpu", found, fix))
    if len(answers) > 1:
        checks += _equal_versions(
            {name: {"Python": facts["python"]} | facts["packages"] for name, facts in answers.items()}
        )
        checks.append(_clock(answers, before, after))
    return checks


def _clock(answers: Mapping[str, Any], before: float, after: float) -> Check:
    away = {name: clock_difference(facts["time"], before, after) for name, facts in answers.items()}
    wrong = [f"{name} by {seconds:.0f} s" for name, seconds in away.items() if seconds > CLOCK_SECONDS]
    if not wrong:
        return ok("clock", f"equal on {len(answers)} machines")
    fix = "turn on network time there: sudo timedatectl set-ntp true"
    return warn("clock", f"differs from this machine's on {', '.join(wrong)}", fix)


def _equal_versions(versions: dict[str, dict[str, str]]) -> list[Check]:
    """Return a FAIL for an unequal Python or Ray, which keep nodes from talking, and a WARN for other packages."""
    checks = []
    packages = sorted({package for node in versions.values() for package in node})
    for package in packages:
        found = {name: node.get(package, "none") for name, node in versions.items()}
        if len(set(found.values())) == 1:
            continue
        usual = Counter(found.values()).most_common(1)[0][0]
        others = ", ".join(f"{version} on {name}" for name, version in found.items() if version != usual)
        text = f"{package} is {usual}, but {others}"
        if package in ("Python", "ray"):
            fix = f"make every node's environment from the same clone with {package} {usual}, and restart Ray there"
            checks.append(fail("versions", SETUP, text, fix))
        else:
            fix = f"pip install {package}=={usual} there; with unequal versions the bytes depend on who computed them"
            checks.append(warn("versions", text, fix))
    return checks or [ok("versions", f"Python and {len(packages) - 1} packages are equal on {len(versions)} machines")]


def clock_difference(there: float, before: float, after: float) -> float:
    """Return the seconds by which a clock that read ``there`` between ``before`` and ``after`` is surely wrong."""
    return max(before - there, there - after, 0.0)


def counted(number: int, what: str) -> str:
    """Return a count in words: ``1 node``, ``2 nodes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"

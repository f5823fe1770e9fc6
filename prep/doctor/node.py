"""Measurements of one machine for ``prep doctor``; ``prep/doctor/rules.py`` says what they mean for a run."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from prep.captions.own_server import has_program

PROBE_SECONDS = 10.0  # importing torch takes 1-5 s
SMI_SECONDS = 4.0
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm")
ONNX_FILE = Path(__file__).parents[1] / "encoders" / "assets" / "demo_yolox.onnx"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
CGROUP_MEMORY = (  # limit and use of a container, versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)

# In a process of its own: a broken driver can crash or hang whoever asks.
PROBE = """
import json, sys
def tell(**values): print(json.dumps(values), flush=True)
try:
    import torch
    tell(torch=torch.__version__, cuda=torch.version.cuda)
    if torch.version.cuda and sys.argv[2] == "cuda":
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            torch.ones(2, device=index).sum().item()
except Exception as error:
    tell(torch_error=(str(error).strip() or type(error).__name__).splitlines()[0])
try:
    import onnxruntime
    onnxruntime.set_default_logger_severity(4)
    tell(onnxruntime=onnxruntime.__version__)
    wanted = ["CUDAExecutionProvider"] if sys.argv[2] == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(sys.argv[1], providers=wanted)
    tell(provider=session.get_providers()[0])
except Exception as error:
    tell(onnxruntime_error=(str(error).strip() or type(error).__name__).splitlines()[0])
"""


def examine_node(in_ray: bool = False) -> dict[str, Any]:
    """Measure this machine: versions, GPU, memory, limits, listening ports.

    ``in_ray``: as a task of Ray, which hides the GPUs from tasks that asked for none. Returns plain values, which
    travel between nodes; takes 20 s at most, usually 2, and whatever the machine lacks, it raises nothing.
    """
    measured_at = time.time()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and not in_ray  # on purpose
    smi = {"gpus": [], "gpu_error": "", "ollama_memory": 0.0} if hidden else _nvidia_smi()
    total, free = _memory()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "host": socket.gethostname(),
        "time": measured_at,
        "python": platform.python_version(),
        "packages": _versions(),
        "unmet": _unmet_requirements(),
        "runtimes": [name for name in RUNTIMES if _version(name)],
        **smi,
        "probe": _probe("cuda" if smi["gpus"] else "cpu", in_ray),
        "ollama": has_program(),
        "compiler": bool(shutil.which("cc") or shutil.which("gcc"))
        and Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": total,
        "memory_free": free,
        "shm_free": shm.free if shm else None,
        "open_files": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
        "listening": {str(port): _listening(port) for port in (GCS_PORT, DASHBOARD_PORT)},
        "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
        "open_token_files": [str(path) for path in _token_files() if _readable_by_others(path)],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _versions() -> dict[str, str]:
    """Return the versions of the packages on which Ray's protocol and the bytes of a dataset depend."""
    names = ("ray", "torch", "transformers", "numpy", "pillow", "pyarrow", "webdataset", *RUNTIMES)
    return {name: version for name in names if (version := _version(name))}


def _unmet_requirements() -> list[str]:
    """Return what pyproject.toml asks for and this environment lacks, such as ``ray>=2.60 (not installed)``."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("nanodit") or []
    except metadata.PackageNotFoundError:  # the folder is used without being installed
        lines = []
    unmet = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if not version or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} ({version or 'not installed'})")
    return unmet


def _nvidia_smi() -> dict[str, Any]:
    """Return the GPUs as the driver sees them, what it says is wrong, and how much of their memory Ollama holds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"gpus": [], "gpu_error": "", "ollama_memory": 0.0}

    def ask(query: str) -> subprocess.CompletedProcess[str]:
        command = [program, query, "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)

    try:
        answer = ask("--query-gpu=name,driver_version,compute_cap,memory.total,memory.free")
        users = ask("--query-compute-apps=process_name,used_memory")
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = "does not answer" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        return {"gpus": [], "gpu_error": f"nvidia-smi {reason}", "ollama_memory": 0.0}
    error = first_line(answer.stdout + answer.stderr) if answer.returncode else ""
    return {
        "gpus": [] if error else read_gpus(answer.stdout),
        "gpu_error": error,
        "ollama_memory": read_ollama_memory(users.stdout),
    }


def read_gpus(table: str) -> list[dict[str, Any]]:
    """Return the rows of ``nvidia-smi --query-gpu``: name, driver, capability ("8.9"), memory and free in bytes.

    A size is None where the memory is shared with the CPU.
    """
    gpus = []
    for line in table.splitlines():
        name, driver, capability, total, free = (cell.strip() for cell in line.rsplit(",", 4))
        gpus.append(
            {"name": name, "driver": driver, "capability": capability, "memory": _mib(total), "free": _mib(free)}
        )
    return gpus


def read_ollama_memory(table: str) -> float:
    """Return the bytes of GPU memory of Ollama's processes, from the rows of ``nvidia-smi --query-compute-apps``."""
    rows = (line.rpartition(",") for line in table.splitlines())
    return sum(_mib(used) or 0.0 for program, _, used in rows if "ollama" in program.lower())


def _mib(cell: str) -> float | None:
    try:
        return float(cell) * 2**20
    except ValueError:  # "[N/A]" where memory is shared with the CPU
        return None


def first_line(text: str) -> str:
    """Return the first line of ``text`` that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _probe(device: str, in_ray: bool) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if in_ray and not environment.get("CUDA_VISIBLE_DEVICES"):
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-P", "-c", PROBE, str(ONNX_FILE), device]
    answers: dict[str, Any] = {"end": "", "late": False}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS)
        output = done.stdout
        if done.returncode:
            answers["end"] = f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        answers |= {"end": f"no answer within {PROBE_SECONDS:.0f} s", "late": True}
    for line in output.splitlines():
        if line.startswith("{"):
            answers |= json.loads(line)
    return answers


def _memory() -> tuple[float, float]:
    """Return the bytes of memory of this machine or its container, and how many of them are free."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = total
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in CGROUP_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, limited := float(Path(limit).read_text()))
            free = min(free, limited - float(Path(used).read_text()))
    return total, max(free, 0.0)


def _listening(port: int) -> list[str]:
    """Return the addresses on which a program of this machine listens at ``port``; none where the system cannot say."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                address, _, digits = local.partition(":")
                if state == "0A" and int(digits, 16) == port:  # 0A is LISTEN
                    found.add(_address(address))
    return sorted(found)


def _address(digits: str) -> str:
    """Return an address of /proc/net/tcp as text: 32-bit words in the byte order of the machine."""
    words = [int(digits[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)  # ::ffff:127.0.0.1 is 127.0.0.1


def _token_files() -> list[Path]:
    home = Path.home()
    cache = os.environ.get("HF_HOME") or home / ".cache" / "huggingface"
    ray = os.environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token"
    return [Path(ray), Path(os.environ.get("HF_TOKEN_PATH") or Path(cache, "token"))]


def _readable_by_others(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
    except OSError:
        return False

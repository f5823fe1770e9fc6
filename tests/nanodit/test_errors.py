"""What a user sees of a failure: one line and an exit code, or a traceback where the defect is ours."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanodit.errors import DataError, MemoryShortage, ResourceError, gpu_is_full, resource_error, run_command


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def failing(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("x.png: torn"), 3, "x.png: torn"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.tar"),
            4,
            "out/a.tar: cannot be written: No space left",
        ),
        (OSError(errno.EDQUOT, "Quota exceeded"), 4, "cannot be written: Quota exceeded"),
        (OSError(errno.EFBIG, "File too large"), 4, "File too large"),
        (OSError(errno.EROFS, "Read-only file system"), 4, "Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "out/a.png"), 4, "out/a.png: Permission denied. Check"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"out/a"), 4, "out/a: Not a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone/a"), 4, "gone/a: No such file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 4, "a: Is a directory"),
        (OSError(errno.ESTALE, "Stale file handle", "nfs/a"), 4, "nfs/a: Stale file handle"),
        (OSError(errno.EIO, "Input/output error"), 4, "Input/output error. Check the disk"),
        (OSError(errno.EMFILE, "Too many open files"), 4, "Too many open files. Raise the limit"),
        (MemoryError(), 4, "out of memory. Close"),
        (OutOfMemoryError("CUDA out of memory.\nmore"), 4, "out of memory: CUDA out of memory."),
        (KeyboardInterrupt(), 75, "the same command continues"),
    ],
)
def test_what_a_user_can_act_on_is_one_line(capsys, error, code, message):
    assert run_command(failing(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [DataError("x.png: torn"), FileNotFoundError(errno.ENOENT, "No such file or directory", "gone/a")]
)
def test_the_traceback_of_any_error_is_to_be_had(capsys, monkeypatch, error):
    monkeypatch.setenv("NANODIT_TRACEBACK", "1")
    run_command(failing(error))
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert f"\n{type(error).__module__}.{type(error).__name__}: ".replace("builtins.", "") in printed
    assert printed.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("error", [OSError(errno.EINVAL, "Invalid argument"), ValueError("a defect")])
def test_a_defect_keeps_its_traceback(error):
    assert resource_error(error) is None
    with pytest.raises(type(error)):
        run_command(failing(error))


def test_a_lack_of_room_is_a_resource_error():
    assert isinstance(resource_error(OSError(errno.ENOSPC, "full")), ResourceError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_nobody_handles_gives_75_and_leaves_the_handlers_as_they_were(capsys, number):
    def main():
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not noticed")

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(main) == 75
    assert capsys.readouterr().err.startswith("error: stopped by a signal")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_code_from_a_string_gives_75_too(tmp_path):
    """As in dataclasses, which are made while a program starts: `python -m` would end by SIGINT in the end."""
    (tmp_path / "program.py").write_text(
        "import sys\nfrom nanodit.errors import run_command, settled\n"
        "asks = 'import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)'\n"
        "sys.exit(settled(run_command(lambda: exec(asks))))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "stopped by a signal" in done.stderr


def test_a_handler_inside_has_precedence():
    seen = []

    def main():
        before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)

    assert run_command(main) == 0
    assert seen == [signal.SIGTERM]


def test_a_forked_child_ends_as_any_process():
    def main():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    assert run_command(main) == -signal.SIGTERM


def test_other_threads_run_commands_too():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: 0)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_reader_who_has_seen_enough_ends_the_command_without_a_word():
    code = (
        "import sys\nfrom nanodit.errors import run_command\n"
        "def main():\n    while True:\n        print('x' * 100, flush=True)\n"
        "sys.exit(run_command(main))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "x" * 100 + "\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 75


@pytest.mark.parametrize(
    ("number", "command"),
    [
        (signal.SIGTERM, ["nanodit", "prep", "verify", "missing"]), (signal.SIGINT, ["prep", "verify", "missing"]),
        (signal.SIGINT, ["train", "plan", "--config", "missing"]),
        (signal.SIGINT, ["evaluate", "report", "missing", "--output", "page.html"]),
    ],
)  # fmt: skip
def test_a_signal_at_the_end_of_a_program_changes_nothing(tmp_path, number, command):
    code = (
        "import atexit, runpy, sys, time\n"
        "atexit.register(lambda: (print('ending', flush=True), time.sleep(60)))\n"
        f"sys.argv = {command}\n"
        f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ending\n"
    process.send_signal(number)
    rest, errors = process.communicate(timeout=30)
    assert rest == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert process.returncode in (2, 3)


BESIDE = """
import sys, threading
from nanodit import console
from nanodit.errors import run_command

def heard(text, say=console.say):
    try:
        say(text)
    finally:
        said.set()

def main():
    console.say("begun")
    sys.stdin.read()
    said.clear()
    with WORK:
        said.wait()
    console.say("over")

console.PLAIN_INTERVAL, console.say, said = 0.05, heard, threading.Event()
sys.exit(run_command(main))
"""


@pytest.mark.parametrize("work", ["console.waiting('reading', at_once=False)", "console.Progress('px', 3)"])
def test_what_is_said_beside_the_work_ends_no_less_silently(work):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", BESIDE.replace("WORK", work)], text=True, **pipes)
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 75


def test_another_broken_pipe_is_a_defect():
    with pytest.raises(BrokenPipeError):
        run_command(failing(BrokenPipeError(errno.EPIPE, "a worker's")))


GPU_IS_FULL = [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. Status "
        "Message: bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate "
        "memory for requested buffer of size 939524096"
    ),
    RuntimeError("CUDNN failure 4000: CUDNN_STATUS_ALLOC_FAILED ; GPU=0 ; file=cuda_execution_provider.cc"),
]
GPU_IS_SOMETHING_ELSE = [
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    OSError("out of memory error when reading image file"),
    DataError("CUDA out of memory, says a caption"),
    ValueError("CUDA is fine"),
]


@pytest.mark.parametrize("error", GPU_IS_FULL, ids=lambda error: str(error)[:40])
def test_a_gpus_lack_of_memory_is_known_by_class_or_words(error):
    assert gpu_is_full(error, "cuda:0")
    assert isinstance(resource_error(error), MemoryShortage)
    assert gpu_is_full(error, "cpu") == isinstance(error, OutOfMemoryError), "words of a GPU mean nothing on a CPU"


@pytest.mark.parametrize("error", GPU_IS_SOMETHING_ELSE, ids=lambda error: str(error)[:40])
def test_other_failures_of_a_gpu_are_not(error):
    assert not gpu_is_full(error)
    assert resource_error(error) is None


def test_torchs_own_class_is_known():
    assert gpu_is_full(pytest.importorskip("torch").OutOfMemoryError("CUDA out of memory."), "cpu")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_console_that_cannot_show_a_name_shows_its_escape(encoding):
    code = (
        "from nanodit.console import say\n"
        "from nanodit.errors import DataError, run_command\n"
        "def main():\n"
        "    say('wrote \u6771\u4eac.png')\n"
        "    print('\u6771')\n"
        "    raise DataError('\u6771\u4eac.png: torn')\n"
        "raise SystemExit(run_command(main))\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "wrote \\u6771\\u4eac.png" in done.stdout
    assert done.stderr == "error: \\u6771\\u4eac.png: torn\n"

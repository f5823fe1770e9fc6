"""What looks on: whatever it does, and however it fails, training notices nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from nanodit.errors import DataError, MemoryShortage, ResourceError
from train.checkpoint.run_folder import StopRequest
from train.loop.observers import finite, observe, process_restored


def globals_of_the_process():
    return (
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),  # noqa: NPY002
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    )  # fmt: skip


def turn_everything_over():
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")


@pytest.mark.parametrize("error", [None, RuntimeError("offline"), KeyboardInterrupt()])
def test_trap_28_what_is_global_is_put_back(error):
    before = globals_of_the_process()
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), process_restored():
        turn_everything_over()
        assert all(now != then for now, then in zip(globals_of_the_process(), before))
        if error:
            raise error
    assert globals_of_the_process() == before  # trap 28


def test_a_failure_is_a_warning_that_is_kept(tmp_path, capsys):
    def fail():
        torch.manual_seed(7)
        raise RuntimeError("no weights\nhere")

    before = globals_of_the_process()
    assert observe("validation", 7, tmp_path, StopRequest(), fail) is None
    assert globals_of_the_process() == before
    assert capsys.readouterr().out == (
        "warning: validation at step 7 failed, but training goes on: RuntimeError: no weights\\nhere\n"
    )
    assert observe("visual_debug", 8, tmp_path, StopRequest(), lambda: 1 / 0) is None
    records = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [(record["step"], record["what"]) for record in records] == [(7, "validation"), (8, "visual_debug")]
    assert "in fail" in records[0]["traceback"]
    assert observe("validation", 9, tmp_path, StopRequest(), lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory. Tried. Close other"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "out of memory: CUDA error: CUBLAS_STATUS_ALLOC"),
        (MemoryError(), "out of memory. Close other programs"),
        (MemoryShortage("DINO: a single item does not fit"), "DINO: a single item does not fit. Or do it less often"),
    ],
)
def test_a_look_that_has_no_room_is_skipped(tmp_path, error, reason, capsys):
    def fail():
        raise error

    assert observe("validation", 7, tmp_path, StopRequest(), fail) is None
    said = capsys.readouterr().out
    assert said.startswith(f"warning: validation at step 7 failed, but training goes on: {reason}")
    assert "`validation.every_steps`" in said
    (record,) = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert record["reason"].startswith(reason)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ResourceError("full")])
def test_a_full_disk_is_no_mere_warning(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(ResourceError, match=r"validation at step 7: .*`validation\.every_steps`"):
        observe("validation", 7, tmp_path, StopRequest(), fail)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_T11_a_signal_gives_a_look_up(tmp_path, number):
    def draw_for_long():
        torch.manual_seed(7)
        os.kill(os.getpid(), number)
        time.sleep(30)

    before, started = globals_of_the_process(), time.monotonic()
    with StopRequest() as stop:
        assert observe("validation", 7, tmp_path, stop, draw_for_long) is None
        assert stop.requested
        assert observe("validation", 8, tmp_path, stop, lambda: 1) is None, "nor is another begun"
    assert time.monotonic() - started < 10
    assert globals_of_the_process() == before
    assert not (tmp_path / "warnings.jsonl").exists()


def test_after_a_look_a_signal_waits_for_the_step(tmp_path):
    with StopRequest() as stop:
        observe("validation", 7, tmp_path, stop, lambda: 1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_an_interrupt_of_anything_else_is_not_swallowed(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe("validation", 7, tmp_path, StopRequest(), interrupt)


def test_values_are_numbers():
    assert finite({"a": 1.0}) == {"a": 1.0}
    with pytest.raises(DataError, match="b, c: not finite"):
        finite({"a": 1.0, "b": float("nan"), "c": float("inf")})

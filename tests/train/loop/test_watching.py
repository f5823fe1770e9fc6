"""What a person sees of a run: a line or a bar while it trains, and TensorBoard with several runs side by side."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.tiny import write_config
from train.__main__ import main

LOOKS = ["train.steps=4", "visual_debug.every_steps=2", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def experiments(tiny_dataset, tmp_path_factory) -> Path:
    """A folder of two runs; the second was continued, and its lines are in ``second.txt``."""
    folder = tmp_path_factory.mktemp("experiments")
    config = write_config(folder / "c.yaml", tiny_dataset, folder / "first")
    assert main(["run", "--config", str(config), *LOOKS]) == 0
    second = ["run", "--config", str(config), f"output={folder / 'second'}", *LOOKS]
    assert main([*second[:3], "--max-hours", "1e-9", *second[3:]]) == 75
    time.sleep(1.1)  # TensorBoard reads the files of one second in the order of their names
    assert main([*second, "seed=0"]) == 0
    return folder


def test_tensorboard_has_scalars_pictures_captions_and_config(experiments):
    board = EventAccumulator(str(experiments / "second" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in board.Images("visual_debug")] == [2, 4]
    text = lambda tag: [event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{tag}/text_summary")]  # noqa: E731
    config = yaml.safe_load(re.sub("^    ", "", text("config")[-1], flags=re.MULTILINE))
    assert config["train"]["steps"] == 4
    assert "1. " in text("visual_debug/captions")[0]
    assert "Picture " in text("visual_debug/captions")[0]


def test_a_real_server_shows_all_runs_of_a_folder(experiments):
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(experiments), "--port", "0", "--load_fast", "false"])
    url = server.launch()

    def get(path: str):
        with urllib.request.urlopen(f"{url}data/{path}", timeout=20) as answer:
            return json.loads(answer.read())

    deadline = time.monotonic() + 60
    while len(get("runs")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs = ["first/tensorboard", "second/tensorboard"]
    assert sorted(get("runs")) == runs
    for run in runs:
        assert "train/loss" in get("plugin/scalars/tags")[run]
        assert "visual_debug" in get("plugin/images/tags")[run]
        assert {"config/text_summary", "visual_debug/captions/text_summary"} <= set(get("plugin/text/tags")[run])
    points = get("plugin/scalars/scalars?tag=train%2Floss&run=second%2Ftensorboard")
    assert [step for _, step, _ in points] == [1, 2, 3, 4]


def test_plain_lines_say_memory_and_the_last_picture(tiny_dataset, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    assert main(["run", "--config", str(config), *LOOKS]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train: 4 steps")]
    assert re.search(r"loss \d\.\d{4}  memory \d+\.\d GB .*image .*visual_debug/step-000004/grid\.png", line)


@pytest.mark.slow
def test_a_terminal_shows_a_bar(tiny_dataset, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(OMP_NUM_THREADS="1", TERM="xterm", COLUMNS="200", LINES="40")
        os.execv(sys.executable, [sys.executable, "-m", "train", "run", "--config", str(config), *LOOKS])
    shown = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # what Linux says when the other end is closed
            break
        if not block:
            break
        shown += block
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "━" in plain
    assert "4/4 steps" in plain
    assert re.search(r"loss \d\.\d{4}", plain)
    assert "grid.png" in plain

"""Captions by a server that the run starts: which weights it has, and what happens where it fails."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from nanodit.errors import ConfigError, ResourceError
from nanodit.storage import open_storage
from prep.captions.own_server import digest_here
from prep.encoders.pins import read_pins
from prep.passes.caption_stage import MAX_DEATHS, caption_units
from prep.passes.plan import UNTIL_THE_RUN
from prep.run import RunFolder, prepare, print_plan
from tests.prep.caption_server import MODEL, CaptionServer
from tests.prep.captioning import (
    ask_here,
    caption_config,
    captions_of,
    commit_crops,
    rejects_of,
    run_captions,
    unit_bytes,
    with_recipes,
)
from tests.prep.fake_ollama import processes, requests, wait_for_none
from tests.prep.passes.test_plan import write_images


@pytest.fixture
def digest(program) -> str:
    """That of the model, which is pulled."""
    return digest_here(MODEL, 10.0)


def test_the_bytes_are_those_of_a_named_server(tmp_path, program, digest):
    own = caption_config(tmp_path, "auto", digest=digest, slots=2)
    tasks = commit_crops(own, shards=2, size=5)
    _, counts = run_captions(own, tasks)
    assert counts[-1]["hosts"] == "1 of 1"
    assert wait_for_none(program) == []
    (tmp_path / "named").mkdir()
    with CaptionServer(digest=digest) as server:
        named = caption_config(tmp_path / "named", [server.url])
        run_captions(named, commit_crops(named, shards=2, size=5))
    assert unit_bytes(own) == unit_bytes(named)
    assert len(captions_of(own, tasks)) == 10


def test_a_server_that_dies_is_started_again_and_costs_no_image(tmp_path, program, digest, capsys):
    (tmp_path / "log" / "seconds").write_text("0.1")
    config = caption_config(tmp_path, "auto", digest=digest, patience=60.0)
    tasks = commit_crops(config, shards=1, size=16)

    def kill() -> None:
        while len(processes(program)) < 2:
            time.sleep(0.02)
        for process in processes(program):
            os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    run_captions(config, tasks)
    thread.join()
    assert rejects_of(config, tasks) == {}
    assert len(captions_of(config, tasks)) == 16
    assert "ended and is started again" in capsys.readouterr().out
    assert wait_for_none(program) == []


def test_a_machine_with_other_weights_is_named(tmp_path, program, digest):
    config = caption_config(tmp_path, "auto", digest="f" * 64)
    with pytest.raises(ConfigError, match=f"Ollama on .* has {digest}, but the captions are made with {'f' * 64}"):
        run_captions(config, commit_crops(config, shards=1, size=4))
    assert wait_for_none(program) == []


def test_the_first_run_records_the_weights_and_a_plan_starts_nothing(tmp_path, program, capsys):
    write_images(tmp_path / "source", 3)
    config = caption_config(tmp_path, "auto", overwrite=True)
    print_plan(config)
    assert f"which weights {MODEL} has is {UNTIL_THE_RUN}" in capsys.readouterr().out
    assert requests(tmp_path / "log") == []
    plan = prepare(config, RunFolder(open_storage(config.output), config), False)
    digest = read_pins(config.output)[MODEL].revision
    assert {recipe["digest"] for unit, recipe in plan.recipes.items() if unit.layer == "text"} == {digest}
    assert plan.config.captions.digest == digest
    assert f"{MODEL} is pinned to {digest}" in capsys.readouterr().out
    starts = len(requests(tmp_path / "log"))
    print_plan(config)
    prepare(config, RunFolder(open_storage(config.output), config), False)
    assert UNTIL_THE_RUN not in capsys.readouterr().out
    assert len(requests(tmp_path / "log")) == starts
    assert wait_for_none(program) == []


def test_without_the_program_a_run_says_so_before_it_computes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_images(tmp_path / "source", 2)
    config = caption_config(tmp_path, "auto", overwrite=True)
    with pytest.raises(ConfigError, match="no program ollama: install it"):
        prepare(config, RunFolder(open_storage(config.output), config), False)


@pytest.mark.parametrize("lost", [1, 0])
def test_samples_not_shards_count_against_the_limit_of_deaths(tmp_path, program, digest, capsys, lost):
    """Workers that die again and again end the run only where nothing gets through in between."""
    config = caption_config(tmp_path, "auto", digest=digest)
    tasks = with_recipes(config, commit_crops(config, shards=1, size=12))
    rounds = []

    def dying(config, recipe, prompt, items):
        rounds.append(items)
        for event in ask_here(config, recipe, prompt, items[:lost]):
            if event["kind"] == "sample":
                yield event
                return

    if lost:
        list(caption_units(config, tasks, 1, lambda counts: None, dying))
        assert len(rounds) == 12  # one sample in each, whatever died after it
        assert "11 images are not captioned and start again" in capsys.readouterr().out
        assert len(captions_of(config, tasks)) == 12
        return
    with pytest.raises(ResourceError, match=f"died {MAX_DEATHS} times one after another, with 12 images not captioned"):
        list(caption_units(config, tasks, 1, lambda counts: None, dying))
    assert len(rounds) == MAX_DEATHS

"""The caption pass against real clients and a local server that speaks the wire formats, with its faults."""

import asyncio
import io
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import canonical_json, sha256_bytes
from prep.captions import quality
from prep.captions.cache import CACHED_BY, CaptionCache, forget_rejects
from prep.captions.hosts import HostPool
from prep.dataset.codecs import webp_bytes
from prep.dataset.layout import Unit, fingerprint_of, read_members, read_part
from prep.dataset.writer import LayerWriter
from prep.passes.captions import PROMPT, caption_recipe, free_all_cards, free_cards, picture_bytes, read_prompt
from prep.passes.layers import ShardTask
from prep.passes.nodes import Node
from prep.passes.plan import make_plan
from prep.run import place
from tests.forked import in_child
from tests.prep.caption_server import DIGEST, MODEL, STATUSES, CaptionServer, caption
from tests.prep.captioning import (
    caption_config,
    captioning,
    captions_of,
    commit_crops,
    rejects_of,
    run_captions,
    text_parts,
    unit_bytes,
    with_recipes,
)


@pytest.fixture
def server():
    with CaptionServer() as server:
        yield server


def pictures(config, tasks) -> dict[str, bytes]:
    """The JPEG of every crop, by key, as servers get it."""
    parts = [read_part(config.output, Unit(task.bucket, task.shard, "px")) for task in tasks]
    crops = {key: data for part in parts for key, data in read_members(config.output, part, "webp")}
    return {key: picture_bytes(data, config.captions.image_side) for key, data in crops.items()}


@pytest.mark.parametrize("backend", ["ollama", "openai"])
def test_captions_are_committed_with_their_provenance(tmp_path, server, backend):
    config = caption_config(tmp_path, [server.url], backend=backend)
    tasks = commit_crops(config, shards=3, size=5)
    done, counts = run_captions(config, tasks)
    assert captions_of(config, tasks) == {key: caption(jpeg) for key, jpeg in pictures(config, tasks).items()}
    assert [unit["layer"] for units in done for unit in units] == ["text"] * 3
    assert sum(unit["samples"] for units in done for unit in units) == 15
    assert counts[-1] == {"samples": 15, "captioned": 15, "cached": 0, "rejected": 0, "hosts": "1 of 1"}
    part = text_parts(config, tasks)[0]
    about = json.loads(next(iter(read_members(config.output, part, "json")))[1])
    options = {"num_ctx": 4096, "num_predict": 400, "temperature": 0.0, "seed": 0, "image_side": 64}
    if backend == "openai":
        del options["num_ctx"]
    prompt = PROMPT.read_text().strip()
    assert about == {
        "backend": backend,
        "model": MODEL,
        "digest": DIGEST if backend == "ollama" else "unknown",
        "prompt": sha256_bytes(prompt.encode()),
        "options": options,
    }
    assert {entry["prompt"] for entry in server.captioned} == {prompt}
    sent = {name: value for name, value in options.items() if name not in ("image_side", "num_ctx")}
    assert all(entry["options"].items() >= sent.items() for entry in server.captioned)
    assert server.url not in b"".join(unit_bytes(config).values()).decode("latin-1")  # a promise about bytes


def test_a_second_run_asks_nobody_and_writes_the_same_bytes(tmp_path, server):
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=2, size=4)
    run_captions(config, tasks)
    before = unit_bytes(config)
    asked = len(server.captioned)
    run_captions(config, tasks)  # committed
    for name in list((tmp_path / "out" / "parts").glob("*.text.parquet")):
        name.unlink()
    _, counts = run_captions(config, tasks)  # from the cache
    assert len(server.captioned) == asked == 8
    assert counts[-1]["cached"] == 8
    assert unit_bytes(config) == before


def test_three_unequal_hosts_of_which_one_dies_caption_everything_once(tmp_path, capsys):
    """Throughput is printed, and not asserted: it is a matter of the machine."""
    with CaptionServer(seconds=0.05, slots=1) as slow, CaptionServer(seconds=0.05, slots=2) as middle:
        fast = CaptionServer(seconds=0.02, slots=2)
        fast.faults[30] = "die"
        hosts = [slow.url, {"url": middle.url, "slots": 2}, {"url": fast.url, "slots": 2}]
        config = caption_config(tmp_path, hosts, cool_down=10.0)
        tasks = commit_crops(config, shards=10, size=12)
        tasks = with_recipes(config, tasks)
        start = time.monotonic()
        list(captioning(config, tasks))
        rate = 120 / (time.monotonic() - start)
        log = [entry["image"] for server in (slow, middle, fast) for entry in server.captioned]
    assert len(captions_of(config, tasks)) == 120
    assert len(log) == len(set(log)) == 120  # nothing was captioned twice
    assert len(slow.captioned) < len(middle.captioned)
    assert [entry["fault"] for entry in fast.log if entry.get("status") == 0 and entry["image"]][:1] == ["die"]
    assert f"caption host {fast.url}" in capsys.readouterr().out
    print(f"{rate:.1f} captions/s with one of three hosts dying")


@pytest.mark.parametrize("fault", ["429", "503", "reset", "html"])
def test_p17_a_host_that_cannot_answer_now_is_left_alone_and_tried_again(tmp_path, server, fault):
    server.faults = dict.fromkeys((2, 3, 6), fault)
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=6)
    run_captions(config, tasks)
    assert len(captions_of(config, tasks)) == len(server.captioned) - (3 if fault == "html" else 0) == 6
    assert rejects_of(config, tasks) == {}


def test_p17_a_host_that_hangs_is_given_up_after_the_timeout(tmp_path, server):
    server.faults = {2: "hang"}
    config = caption_config(tmp_path, [server.url], timeout=0.5)
    tasks = commit_crops(config, shards=1, size=4)
    run_captions(config, tasks)
    assert len(captions_of(config, tasks)) == 4


@pytest.mark.parametrize(("fault", "reason"), [("500", "caption_failed"), ("hang", "caption_timeout")])
def test_p17_an_image_that_servers_fail_on_is_rejected_and_no_other(tmp_path, server, fault, reason):
    config = caption_config(tmp_path, [server.url], timeout=1.5, patience=30.0)
    tasks = commit_crops(config, shards=1, size=6)
    sent = pictures(config, tasks)
    poison = sorted(sent)[3]
    server.poison = {sha256_bytes(sent[poison]): fault}
    run_captions(config, tasks)
    assert rejects_of(config, tasks) == {poison: reason}
    assert len(captions_of(config, tasks)) == 5
    (reject,) = text_parts(config, tasks)[0].rejects
    assert {"500": STATUSES["500"], "hang": "no answer within 1.5 s"}[fault] in reject.detail  # the server's words
    assert server.url not in reject.detail
    asked = len(server.log)
    list(captioning(config, with_recipes(config, tasks)))
    assert [entry for entry in server.log[asked:] if entry["image"]] == []  # it is final until somebody wants another
    server.poison = {}
    assert forget_rejects(config.output, [Unit("64x64", 0, "text"), Unit("64x64", 0, "px")]) == 0
    (tmp_path / "out" / Unit("64x64", 0, "text").part).unlink()
    run_captions(config, tasks)
    assert rejects_of(config, tasks) == {}  # which it then gets: that servers failed was not kept


@pytest.mark.parametrize("status", ["400", "413", "422"])
@pytest.mark.parametrize("first", [True, False])
def test_f4_a_refusal_among_good_answers_belongs_to_its_image(tmp_path, server, status, first):
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=5)
    sent = pictures(config, tasks)
    poison = sorted(sent)[0 if first else -1]  # also of a host that has answered nothing else yet
    server.poison = {sha256_bytes(sent[poison]): status}
    run_captions(config, tasks)
    assert rejects_of(config, tasks) == {poison: "caption_failed"}
    (reject,) = text_parts(config, tasks)[0].rejects
    assert f"HTTP {status}: {STATUSES[status]}" in reject.detail
    assert len(captions_of(config, tasks)) == 4


@pytest.mark.parametrize("fault", ["500", "hang", "reset"])
def test_f2_a_host_that_fails_for_a_while_costs_no_image(tmp_path, server, fault):
    """From the fifth question on it fails on all of them, and then it is well again."""
    server.always = (5, fault)
    config = caption_config(tmp_path, [{"url": server.url, "slots": 4}], timeout=1.0, patience=60.0)
    tasks = commit_crops(config, shards=2, size=12)

    def failed() -> int:
        return sum(entry.get("fault") == fault for entry in [*server.log])

    def recover() -> None:
        while failed() <= 4:
            time.sleep(0.01)
        server.always = None

    threading.Thread(target=recover, daemon=True).start()
    run_captions(config, tasks)
    assert rejects_of(config, tasks) == {}
    assert len(captions_of(config, tasks)) == 24
    assert failed() > 4


def test_f2_a_run_that_ends_with_its_host_leaves_no_reject_behind(tmp_path, server):
    server.always = (3, "500")
    config = caption_config(tmp_path, [server.url], patience=0.5)
    tasks = commit_crops(config, shards=1, size=8)
    with pytest.raises(ResourceError, match=f"no caption host has answered.*{STATUSES['500'][:20]}"):
        run_captions(config, tasks)
    server.always = None
    run_captions(config, tasks)
    assert rejects_of(config, tasks) == {}
    assert len(captions_of(config, tasks)) == 8


def test_f2_an_image_is_blamed_though_it_is_the_last_one_to_ask_about(tmp_path, server):
    """No other image's question can come between: the control question does."""
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=1)
    server.poison = dict.fromkeys(map(sha256_bytes, pictures(config, tasks).values()), "500")
    run_captions(config, tasks)
    assert list(rejects_of(config, tasks).values()) == ["caption_failed"]
    assert [entry.get("fault") for entry in server.log if entry["image"]] == ["500", None, "500"]


def test_f2_faults_that_an_earlier_version_cached_are_asked_about_again(tmp_path, server):
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=2)
    recipe = {name: with_recipes(config, tasks)[0].recipes["text"][name] for name in CACHED_BY}
    cache = CaptionCache(config.output, recipe)
    key = tasks[0].sources[0].key
    entry = {"key": key, **recipe, "answers": [{"text": "", "end": "timeout", "options": {}}]}
    cache.storage.write(cache.name(key), canonical_json(entry))
    run_captions(config, tasks)
    assert len(captions_of(config, tasks)) == 2


@pytest.mark.parametrize(
    ("fault", "reason", "seed"),
    [
        ("refusal", "caption_refused", 1),
        ("empty", "caption_empty", 0),
        ("truncated", "caption_truncated", 0),
        ("short", "caption_too_short", 1),
        ("loop", "caption_repeats", 1),
        ("preamble", "caption_preamble", 1),
        ("chatty", "caption_closing", 1),
        ("thought", "caption_reasoning", 1),
        ("thinking", "caption_only_thinking", 0),
    ],
)
def test_p17_flawed_captions_are_asked_for_once_more_and_then_rejected(tmp_path, server, fault, reason, seed):
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=4)
    sent = pictures(config, tasks)
    first, second = sorted(sent)[:2]
    server.poison = {sha256_bytes(sent[first]): fault}
    run_captions(config, tasks)
    assert rejects_of(config, tasks) == {first: reason}  # trap 3: an error or a caption, never an empty string
    asked = [entry["options"] for entry in server.log if entry["image"] == sha256_bytes(sent[first])]
    assert [options["seed"] for options in asked] == [0, seed]
    assert [options["num_predict"] for options in asked] == ([400, 400] if seed else [400, 800])
    assert [options["temperature"] for options in asked] == [0.0, 0.5 if seed else 0.0]
    assert captions_of(config, tasks)[second] == caption(sent[second])


@pytest.mark.parametrize("backend", ["ollama", "openai"])
def test_reasoning_is_not_published(tmp_path, server, backend):
    server.always = (1, "thinks")
    config = caption_config(tmp_path, [server.url], backend=backend)
    tasks = commit_crops(config, shards=1, size=3)
    run_captions(config, tasks)
    assert captions_of(config, tasks) == {key: caption(jpeg) for key, jpeg in pictures(config, tasks).items()}
    assert len(server.captioned) == 3


def test_a_new_version_of_the_checks_judges_the_answers_that_are_there(tmp_path, server, monkeypatch):
    """What an earlier version took for a caption is asked for again, and nothing else."""
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=4)
    sent = pictures(config, tasks)
    first = min(sent)
    server.poison = {sha256_bytes(sent[first]): "chatty"}
    with monkeypatch.context() as earlier:
        earlier.setattr(quality, "CODE_VERSION", 1)
        earlier.setattr(quality, "find_flaw", lambda answer, rules: None)
        run_captions(config, tasks)
    assert captions_of(config, tasks)[first].endswith("Is there anything else you need?")
    server.poison, asked = {}, len(server.captioned)
    run_captions(config, tasks)
    assert [entry["image"] for entry in server.captioned[asked:]] == [sha256_bytes(sent[first])]
    assert captions_of(config, tasks) == {key: caption(jpeg, seed=int(key == first)) for key, jpeg in sent.items()}


def test_one_flawed_answer_is_mended_by_the_next(tmp_path, server):
    server.faults = {1: "refusal", 2: "truncated"}
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=1)
    run_captions(config, tasks)
    (jpeg,) = pictures(config, tasks).values()
    assert list(captions_of(config, tasks).values()) == [caption(jpeg, seed=1)]
    part = text_parts(config, tasks)[0]
    about = json.loads(next(iter(read_members(config.output, part, "json")))[1])
    assert about["options"] == {
        "num_ctx": 4096, "num_predict": 800, "temperature": 0.5, "seed": 1, "image_side": 64
    }  # fmt: skip


def test_a_server_that_says_the_same_of_every_picture_is_found_out(tmp_path, server):
    server.always = (1, "same")
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=4)
    done, counts = run_captions(config, tasks)
    keys = sorted(source.key for source in tasks[0].sources)
    assert list(captions_of(config, tasks)) == keys[:1]
    assert rejects_of(config, tasks) == dict.fromkeys(keys[1:], "caption_repeats")
    assert done[0][0]["rejected"] == counts[-1]["rejected"] == 3
    assert len(server.captioned) == 4 + 3


def test_p17_redirects_are_refused(tmp_path, server):
    with CaptionServer() as elsewhere:
        server.always, server.redirect_to = (1, "redirect"), elsewhere.url
        config = caption_config(tmp_path, [server.url], patience=0.3)
        tasks = commit_crops(config, shards=1, size=2)
        with pytest.raises(ResourceError, match=r"redirects elsewhere .HTTP 307., which is refused"):
            run_captions(config, tasks)
        config = caption_config(tmp_path, [server.url], patience=0.3, backend="openai")
        with pytest.raises(ResourceError, match=rf"which is refused: {elsewhere.url}"):
            run_captions(config, tasks)
        assert elsewhere.log == []


@pytest.mark.parametrize("backend", ["ollama", "openai"])
def test_p17_keys_go_to_nobody_unless_the_config_names_them(tmp_path, server, backend, monkeypatch):
    monkeypatch.setenv("OLLAMA_API_KEY", "secret-of-ollama")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-openai")
    config = caption_config(tmp_path, [server.url], backend=backend)
    tasks = commit_crops(config, shards=1, size=2)
    run_captions(config, tasks)
    assert {entry["authorization"] for entry in server.log} == {None}
    server.log.clear()
    monkeypatch.setenv("MY_KEY", "mine")
    config = caption_config(tmp_path, [server.url], backend=backend, api_key_variable="MY_KEY", image_side=65)
    run_captions(config, tasks)
    assert {entry["authorization"] for entry in server.log} == {"Bearer mine"}
    everything = b"".join(path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file())
    assert b"mine" not in everything
    assert b"secret" not in everything
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="MY_KEY, which is not set"):
        caption_recipe(config)


@pytest.mark.parametrize(("number", "fault"), [(3, "400"), (1, "400"), (3, "404")])
def test_what_no_host_can_do_ends_the_run_at_once(tmp_path, server, number, fault):
    """A refusal of every picture, the control question's too, is no picture's fault."""
    server.always = (number, fault)
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=6)
    with pytest.raises(ConfigError, match=rf"refuses the request .HTTP {fault}.*captions.options"):
        run_captions(config, tasks)
    assert len(server.log) < 12
    server.always = None
    run_captions(config, tasks)
    log = [entry["image"] for entry in server.captioned]
    assert len(log) == len(set(log)) == 6  # what was captioned was kept


def test_hosts_must_have_the_model_and_the_same_weights(tmp_path, server):
    with CaptionServer(digest="f" * 64) as other, CaptionServer(model="llava:7b") as poor:
        with pytest.raises(ConfigError) as error:
            caption_recipe(caption_config(tmp_path, [server.url, other.url]))
        assert all(text in str(error.value) for text in (server.url, other.url, DIGEST, "f" * 64))
        with pytest.raises(ConfigError, match=rf"{poor.url} has no model {MODEL} .it has llava:7b.*ollama pull"):
            caption_recipe(caption_config(tmp_path, [server.url, poor.url]))
        with pytest.raises(ConfigError, match=f"{poor.url} has no model"):
            caption_recipe(caption_config(tmp_path, [poor.url], backend="openai"))
        # a host that had not been heard of at the plan brings other weights
        config = caption_config(tmp_path, [server.url, other.url], digest=DIGEST)
        tasks = commit_crops(config, shards=1, size=8)
        with pytest.raises(ConfigError, match=f"{other.url} has {'f' * 64}, but the captions are made with {DIGEST}"):
            run_captions(config, tasks)


def test_all_hosts_down_for_too_long_is_a_lack_of_resources_and_keeps_what_was_made(tmp_path):
    servers = [CaptionServer(), CaptionServer()]
    servers[0].faults, servers[1].faults = {3: "die"}, {2: "die"}
    config = caption_config(tmp_path, [server.url for server in servers], patience=0.5)
    tasks = commit_crops(config, shards=1, size=12)
    with pytest.raises(
        ResourceError, match=r"no caption host has answered for .*The captions made so far are kept"
    ) as error:
        run_captions(config, tasks)
    assert all(server.url in str(error.value) for server in servers)
    kept = len(list((tmp_path / "out" / "captions").rglob("*.json")))
    assert kept == sum(len(server.captioned) for server in servers) == 3
    with pytest.raises(ResourceError, match=r"no caption host answers: .*cannot be reached.*captions.digest"):
        caption_recipe(config)
    assert caption_recipe(caption_config(tmp_path, [servers[0].url], digest="pinned"))["digest"] == "pinned"
    with CaptionServer() as again:
        config = caption_config(tmp_path, [again.url])
        run_captions(config, tasks)
        assert len(again.captioned) == 12 - kept


def test_one_silent_host_of_two_is_a_warning(tmp_path, server, capsys):
    dead = CaptionServer()
    dead.die()
    config = caption_config(tmp_path, [dead.url, server.url])
    assert caption_recipe(config)["digest"] == DIGEST
    assert f"warning: caption host {dead.url} cannot be reached" in capsys.readouterr().out
    tasks = commit_crops(config, shards=1, size=4)
    run_captions(config, tasks)
    assert len(captions_of(config, tasks)) == 4


def test_a_caller_that_stops_loses_nothing_that_was_answered(tmp_path):
    with CaptionServer(seconds=0.05) as server:
        config = caption_config(tmp_path, [{"url": server.url, "slots": 3}])
        tasks = commit_crops(config, shards=4, size=6)
        units = captioning(config, with_recipes(config, tasks))
        next(units)
        with pytest.raises(KeyboardInterrupt):
            units.throw(KeyboardInterrupt)
        assert not [thread for thread in threading.enumerate() if thread.name == "captions"]
        time.sleep(0.2)
        kept = len(list((tmp_path / "out" / "captions").rglob("*.json")))
        # the server finishes what it has begun, though nobody is there to hear it
        assert len(server.captioned) - 3 <= kept <= len(server.captioned) < 24
        seen = len(server.log)
        run_captions(config, tasks)
        assert len([entry for entry in server.log[seen:] if entry["image"]]) == 24 - kept
    assert len(captions_of(config, tasks)) == 24


@pytest.mark.parametrize("point", ["captions.after_cache:kill:11", "shards.before_part:kill:5"])
def test_a_killed_run_asks_nobody_twice_and_ends_with_the_same_bytes(tmp_path, server, point):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    config = caption_config(undisturbed, [{"url": server.url, "slots": 2}])
    tasks = commit_crops(config, shards=3, size=8)
    run_captions(config, tasks)
    server.log.clear()

    def caption() -> None:
        config = caption_config(killed, [{"url": server.url, "slots": 2}])
        run_captions(config, commit_crops(config, shards=3, size=8))

    assert in_child(caption, fault=point) == -9
    first = [entry["image"] for entry in server.captioned]
    cached = len(list((killed / "out" / "captions").rglob("*.json")))
    assert cached >= 11
    assert in_child(caption) == 0
    again = [entry["image"] for entry in server.captioned][len(first) :]
    assert len(again) == 24 - cached
    config_killed = caption_config(killed, [{"url": server.url, "slots": 2}])
    assert unit_bytes(config_killed) == unit_bytes(config)


def test_changing_the_model_makes_text_and_t5_again_and_nothing_else(tmp_path, server):
    config = caption_config(tmp_path, [server.url])
    for number in range(3):
        Image.new("RGB", (80, 64), (number * 80, 0, 0)).save(tmp_path / "source" / f"{number}.png")
    plan = make_plan(config)
    for unit, recipe in plan.recipes.items():
        with LayerWriter(config.output, unit, recipe, {}) as writer:
            writer.commit()
    assert make_plan(config).missing == {}
    silent = make_plan(caption_config(tmp_path, ["http://127.0.0.1:9"]))  # a finished dataset needs no host
    assert silent.missing == {}
    assert "no caption host answers" in silent.notes[0]
    with pytest.raises(ResourceError, match="no caption host answers"):
        make_plan(caption_config(tmp_path, ["http://127.0.0.1:9"], model="llava:7b"))
    limits = make_plan(caption_config(tmp_path, [server.url], min_words=20)).missing
    with CaptionServer(model="llava:7b", digest="e" * 64) as other:
        missing = make_plan(caption_config(tmp_path, [other.url], model="llava:7b")).missing
    assert {unit.layer: why for unit, why in missing.items()} == {
        "text": "changed: digest, model",
        "t5": "changed: text layer",
    }
    assert {unit.layer: why for unit, why in limits.items()}["text"] == "changed: checks.min_words"
    for number in range(3):
        (tmp_path / "source" / f"{number}.txt").write_text(f"Picture {number}.")
    missing = make_plan(caption_config(tmp_path, [server.url], backend="sidecar")).missing
    assert {unit.layer for unit in missing} == {"text", "t5"}
    assert all("backend" in why for unit, why in missing.items() if unit.layer == "text")


def test_prompts_come_from_files(tmp_path):
    config = caption_config(tmp_path, ["http://127.0.0.1:1"])
    assert 150 < len(read_prompt(config.captions).split()) < 300
    (tmp_path / "prompt.txt").write_text(" Describe it. \n")
    own = caption_config(tmp_path, ["http://127.0.0.1:1"], prompt=str(tmp_path / "prompt.txt"), digest="d")
    assert read_prompt(own.captions) == "Describe it."
    assert caption_recipe(own)["prompt"] == sha256_bytes(b"Describe it.")
    for content in (b"", b"\xff"):
        (tmp_path / "prompt.txt").write_bytes(content)
        with pytest.raises(ConfigError, match=r"captions.prompt .*prompt.txt"):
            caption_recipe(own)


def test_a_filter_of_the_server_is_a_refusal(tmp_path, server):
    server.always = (1, "filtered")
    config = caption_config(tmp_path, [server.url], backend="openai")
    tasks = commit_crops(config, shards=1, size=1)
    run_captions(config, tasks)
    assert set(rejects_of(config, tasks).values()) == {"caption_refused"}


@pytest.mark.skipif(os.environ.get("NANODIT_LIVE_OLLAMA") != "1", reason="set NANODIT_LIVE_OLLAMA=1 and OLLAMA_HOST")
def test_a_live_ollama(tmp_path):
    model = os.environ.get("NANODIT_LIVE_MODEL", MODEL)
    config = caption_config(tmp_path, None, model=model, timeout=600.0, min_words=1)
    tasks = commit_crops(config, shards=1, size=2)
    run_captions(config, tasks)
    assert len(captions_of(config, tasks)) + len(rejects_of(config, tasks)) == 2
    assert len(caption_recipe(config)["digest"]) == 64


def test_a_server_on_a_card_of_the_run_is_asked_to_unload(tmp_path, server, capsys):
    config = caption_config(tmp_path, [server.url])
    card = Node("id", "127.0.0.1", "here", 4, 1, 12, driver=True)
    run_captions(config, commit_crops(config, 1, 2))
    assert server.loaded
    assert free_cards(config, [Node("id", "127.0.0.1", "here", 4, driver=True)])  # no card, nobody is asked
    assert server.loaded
    assert free_cards(config, [card])
    assert not server.loaded
    assert [entry["path"] for entry in server.log[-2:]] == ["/api/generate", "/api/ps"]
    server.loaded = server.stubborn = True
    assert not free_cards(
        config.model_copy(update={"captions": config.captions.model_copy(update={"timeout": 0.5})}), [card]
    )
    assert (
        f"{server.model} may still be on a GPU that is needed now: {server.url} no answer within 0.5 s"
        in capsys.readouterr().out
    )
    server.stubborn = False
    driver, other = replace(card, id="driver", gpus=0), replace(card, driver=False)  # a node of Ray for each card
    assert free_cards(config, [driver, other])
    assert not server.loaded
    server.die()
    assert free_cards(config, [card])  # where nobody listens, nothing is loaded


def test_all_servers_unload_when_the_captions_are_through(tmp_path, server):
    with CaptionServer() as other:
        config = caption_config(tmp_path, [server.url, other.url], timeout=0.5)
        card = Node("id", "127.0.0.1", "here", 4, 1, 12, driver=True)
        for stubborn, here, freed in ((False, [card], True), (True, [], True), (True, [card], False)):
            server.loaded = other.loaded = True
            server.stubborn = stubborn
            assert free_all_cards(config, here) is freed
            assert (server.loaded, other.loaded) == (stubborn, False)


def test_passes_are_placed_on_cards_that_the_servers_have_left(tmp_path, server, capsys):
    """Before the captions, and for T5 after them; beside a server that keeps its model, on what is left."""
    config = caption_config(tmp_path, [server.url], timeout=0.5)
    full = config.model_copy(update={"encoders": "production", "layers": ["text", "dino"]})
    card = Node("id", "127.0.0.1", "here", 4, 1, 12, memory_gb=32, driver=True)
    for layers in (full.active_layers, {"t5"}):
        server.loaded = True
        passes, remarks = place(full, [card], layers)
        assert not server.loaded
        assert {layer: one.device for one in passes for layer in one.layers}["t5"] == "cuda"
        assert remarks == []
    server.loaded = True
    place(full, [card], {"text", "t5"})
    assert server.loaded  # which captions are going to need
    server.stubborn = True
    passes, remarks = place(full, [card], {"t5"})
    assert [one.device for one in passes] == ["cpu"]
    assert any("20 GB of its GPU memory are kept" in remark for remark in remarks)
    assert "may still be on a GPU" in capsys.readouterr().out


def test_an_openai_server_is_not_asked_to_unload(tmp_path, server):
    config = caption_config(tmp_path, [f"{server.url}/v1"], backend="openai")
    assert free_cards(config, [Node("id", "127.0.0.1", "here", 4, 1, 12, driver=True)])
    assert server.log == []


def test_hosts_can_be_asked_directly(tmp_path, server):
    async def ask() -> str:
        config = caption_config(tmp_path, [server.url])
        async with HostPool(config.captions, DIGEST) as hosts:
            answer, _ = await hosts.ask(
                b"jpeg", "Describe.", {"num_ctx": 1, "num_predict": 9, "seed": 1, "temperature": 0}
            )
        return answer.text

    assert asyncio.run(ask()) == caption(b"jpeg")


def test_with_filters_on_persons_only_those_who_passed_them_are_captioned(tmp_path, server):
    config = caption_config(tmp_path, [server.url])
    tasks = commit_crops(config, shards=1, size=5)
    fields = config.model_dump(mode="json") | {"layers": ["text", "pose"], "filters": {"min_persons": 1}}
    config = type(config).model_validate(fields)
    assert config.upstream("text") == "pose"
    keys = [source.key for source in tasks[0].sources]
    pose = {"layer": "pose", "persons": 1}
    with LayerWriter(config.output, Unit("64x64", 0, "pose"), pose, {}) as writer:
        for key in keys[::2]:
            writer.add(key, {"pose.npy": b"joints", "json": b"{}"}, persons=1)
        writer.commit()
    upstream = fingerprint_of(pose)
    recipes = {"text": {"layer": "text", "code": 1, "upstream": upstream, **caption_recipe(config)}}
    list(captioning(config, [ShardTask("64x64", 0, tasks[0].sources, recipes)]))
    assert list(captions_of(config, tasks)) == keys[::2]
    assert len(server.captioned) == 3
    recipes["text"]["upstream"] = "something else"
    with pytest.raises(DataError, match="what it is made from disappeared"):
        list(captioning(config, [ShardTask("64x64", 0, tasks[0].sources, recipes)]))


def test_crops_may_be_jpeg(tmp_path, server):
    config = caption_config(tmp_path, [server.url], image_side=65)
    tasks = commit_crops(config, shards=1, size=2, image_format="jpeg")
    run_captions(config, tasks)
    assert len(captions_of(config, tasks)) == 2


def test_pictures_are_reduced_to_the_side_that_the_model_sees():
    crop = webp_bytes(np.zeros((40, 100, 3), np.uint8))
    for side, size in ((50, (50, 20)), (100, (100, 40)), (896, (100, 40))):
        with Image.open(io.BytesIO(picture_bytes(crop, side)), formats=["JPEG"]) as image:
            assert image.size == size

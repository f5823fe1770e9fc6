"""Placement: every card is used, none is overbooked, and what can never run is refused in words instead of a stall."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodit.errors import ConfigError, ResourceError
from prep.captions.config import CaptionConfig
from prep.config import PrepConfig
from prep.passes.caption_placement import caption_hosts, caption_seats, captions_vram, serves
from prep.passes.nodes import Node, local_node, nodes_from_ray
from prep.passes.placement import DEMO_WORKER_GB, gpu_offers, in_order, memory_need, plan_passes, vram_need


def config(**changes) -> PrepConfig:
    return PrepConfig(source="photos", output="dataset", **changes)


def captioned(model: str = "gemma3:27b", hosts: tuple[str, ...] = ("http://localhost:11434",), **changes) -> PrepConfig:
    captions = CaptionConfig(backend="ollama", model=model, hosts=list(hosts))
    return config(**changes).model_copy(update={"captions": captions})


def node(name: str, cpus: float = 8, vram: float = 0, gpus: float | None = None, memory: float = 64, **more) -> Node:
    cards = gpus if gpus is not None else float(vram > 0)
    return Node(f"id-{name}", more.pop("address", f"10.0.0.{name}"), f"host{name}", cpus, cards, vram, memory, **more)


BIG, SMALL, ALSO_SMALL, BOX = node("1", 16, 23), node("2", 8, 12), node("3", 8, 12), node("4", 32, driver=True)
MIXED = [BIG, SMALL, ALSO_SMALL, BOX]


def shape(steps) -> list[tuple[tuple[str, ...], str]]:
    return [(step.layers, step.device) for step in steps]


def overbooked(settings_: PrepConfig, nodes: list[Node]) -> list[str]:
    """Fill every node as Ray would, knowing the demands alone; the tightest cards on which memory runs out."""
    steps, problems = plan_passes(settings_, nodes)[0], []
    free = {offer.node.id: offer for offer in gpu_offers(settings_, nodes, [])}
    for step in steps:
        for place in nodes:
            if step.device != "cuda" or place.id in step.excluded or place.id not in free:
                continue
            on_a_card = int(1 / step.gpus + 1e-9)
            if step.vram_gb:
                on_a_card = min(on_a_card, int(place.vram_gb / step.vram_gb + 1e-9))
            if on_a_card > free[place.id].holds(vram_need(settings_, step.layers)):
                problems.append(f"{place}: {step}")
    return problems


# --- the order of the passes ------------------------------------------------------------------------------------------


def test_without_gpus_and_with_sidecars_there_is_one_pass():
    steps, remarks = plan_passes(config(), [BOX])
    assert shape(steps) == [(("px", "text", "t5", "dino", "pose"), "cpu")]
    assert any("no GPU" in remark for remark in remarks)  # never silently


def test_generated_captions_come_between_the_images_and_t5():
    steps, _ = plan_passes(captioned(), [BOX])
    assert shape(steps) == [(("px", "dino", "pose"), "cpu"), (("text",), "captions"), (("t5",), "cpu")]
    steps, _ = plan_passes(captioned(), MIXED)
    assert shape(steps) == [
        (("px",), "cpu"), (("dino", "pose"), "cuda"), (("text",), "captions"), (("t5",), "cuda")
    ]  # fmt: skip


def test_with_gpus_the_encoders_share_one_pass_after_the_pixels():
    steps, _ = plan_passes(config(), MIXED)
    assert shape(steps) == [(("px", "text"), "cpu"), (("t5", "dino", "pose"), "cuda")]


def test_only_missing_layers_are_placed():
    assert shape(plan_passes(captioned(), MIXED, {"text", "t5"})[0]) == [(("text",), "captions"), (("t5",), "cuda")]
    assert plan_passes(config(), MIXED, set()) == ([], [])


def test_a_layer_never_comes_before_what_it_is_made_from():
    layers = ("px", "text", "t5", "dino", "pose")
    for devices in itertools.product(("cpu", "cuda", "captions"), repeat=len(layers)):
        settings_ = config()
        done: list[str] = []
        for group, _ in in_order(settings_, dict(zip(layers, devices))):
            for layer in group:
                assert layer == "px" or settings_.upstream(layer) in done
                done.append(layer)
        assert sorted(done) == sorted(layers)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_needs_follow_the_batch_the_input_and_the_users_word():
    assert vram_need(config(), ["t5", "dino", "pose"]) == pytest.approx(4.6, abs=0.1)
    assert vram_need(config(dino={"input_scale": 1.0}), ["dino"]) > vram_need(config(), ["dino"]) + 1
    assert vram_need(config(t5={"batch_size": 64}), ["t5"]) > vram_need(config(), ["t5"]) + 1
    assert vram_need(config(placement={"vram_gb": {"dino": 7.0}}), ["dino"]) == 7.5
    assert vram_need(config(encoders="demo"), ["t5", "dino", "pose"]) < 1.5
    assert memory_need(config(), ["px", "text"]) == memory_need(config(encoders="demo"), ["px", "text"]) == 0
    assert memory_need(config(encoders="demo"), ["t5"]) == DEMO_WORKER_GB
    assert (
        memory_need(config(), ["dino", "pose"]) > memory_need(config(), ["dino"]) + memory_need(config(), ["pose"]) - 1
    )
    assert memory_need(config(), ["dino"]) > vram_need(config(), ["dino"])  # fp32 on CPUs


def test_a_4090_two_3060s_and_a_box_are_all_used():
    steps, remarks = plan_passes(config(), MIXED)
    pixels, encoders = steps
    assert pixels.actors == 64
    assert (encoders.actors, encoders.gpus, encoders.excluded) == (6, 0.5, ())
    assert encoders.vram_gb == vram_need(config(), ["t5", "dino", "pose"])
    assert encoders.max_actors > encoders.actors
    assert remarks == []
    assert not overbooked(config(), MIXED)


def test_a_small_card_makes_the_encoders_run_one_by_one_instead_of_idling():
    tiny = node("5", 4, 3)
    steps, _ = plan_passes(config(), [*MIXED, tiny])
    assert shape(steps[1:]) == [(("t5",), "cuda"), (("dino",), "cuda"), (("pose",), "cuda")]
    assert [step.actors for step in steps[1:]] == [7, 7, 7]
    assert not overbooked(config(), [*MIXED, tiny])


def test_what_fits_no_card_runs_on_cpus_and_that_is_said():
    steps, remarks = plan_passes(config(), [node("1", 4, 2), BOX])
    assert shape(steps) == [(("px", "text", "pose"), "cpu"), (("t5",), "cuda"), (("dino",), "cuda")]
    assert any(remark.startswith("pose needs") and "runs on CPUs" in remark for remark in remarks)


def test_cuda_alone_is_refused_where_it_can_never_be():
    with pytest.raises(ResourceError, match=r"pose needs 2\.2 GB.*host4 \(32 CPUs\).*placement\.device=auto"):
        plan_passes(config(placement={"device": "cuda"}), [node("1", 4, 2), BOX])
    with pytest.raises(ResourceError, match="no node offers it"):
        plan_passes(config(placement={"device": "cuda"}), [BOX])
    steps, _ = plan_passes(config(placement={"device": "cpu"}), MIXED)
    assert {step.device for step in steps} == {"cpu"}


def test_several_cards_behind_one_node_are_each_safe():
    host = node("7", 16, 24, gpus=4)  # four cards of 6 GB, which Ray cannot tell apart
    steps, _ = plan_passes(config(), [host, BIG])
    assert steps[1].gpus == 1  # two of 4.6 GB would share a card of 6
    assert steps[1].actors == 5
    assert not overbooked(config(), [host, BIG])


def test_cards_of_unknown_size_take_one_worker_each_and_that_is_said():
    steps, _ = plan_passes(config(), [node("9", 8, gpus=1)])
    assert (steps[1].actors, steps[1].gpus) == (1, 1.0)
    unknown = node("9", 8, gpus=2)
    steps, remarks = plan_passes(config(), [unknown, BIG])
    assert (steps[1].actors, steps[1].gpus, steps[1].vram_gb) == (3, 1.0, 0)
    assert any("registers no vram_gb" in remark and "host9" in remark for remark in remarks)


def test_a_gpu_that_ray_would_take_but_is_too_small_is_excluded():
    unknown, tiny = node("9", 8, gpus=1), node("5", 4, 1)
    steps, remarks = plan_passes(config(), [unknown, tiny])
    assert steps[1].excluded == ("id-5",)
    assert steps[1].demands()["label_selector"] == {"ray.io/node-id": "!in(id-5)"}
    assert any("host5" in remark and "do not fit" in remark for remark in remarks)


def test_fractions_of_three_and_a_host_with_few_cpus():
    rich = node("1", 16, 24)
    step = plan_passes(config(), [rich, BOX])[0][1]
    assert (step.actors, step.cpus, step.threads) == (2, 4, 5)  # more would keep out nodes that join with fewer
    step = plan_passes(config(), [node("1", 6, 24), BOX])[0][1]
    assert (step.cpus, step.threads) == (3, 4)
    assert plan_passes(config(), [BOX])[0][0].threads == 0  # on CPUs there is no device to work beside
    poor = node("1", 2, 24)
    step = plan_passes(config(placement={"actors_per_gpu": 3}), [poor, BOX])[0][1]
    assert (step.gpus, step.actors) == (0.3333, 3)
    assert step.cpus * 3 <= 2
    assert plan_passes(config(workers=2), MIXED)[0][1].actors == 2


def test_main_memory_limits_the_workers_on_cpus():
    steps, remarks = plan_passes(config(), [node("1", 16, memory=32)])
    assert steps[0].actors == int(32 / steps[0].memory_gb) < 16
    assert steps[0].demands()["memory"] == int(steps[0].memory_gb * 1e9)
    assert any("GB of memory" in remark for remark in remarks)
    steps, remarks = plan_passes(config(), [node("1", 16, memory=2)])
    assert (steps[0].actors, steps[0].memory_gb) == (1, 0)
    assert any("only one is started" in remark for remark in remarks)


def test_no_cpu_anywhere_is_refused():
    with pytest.raises(ResourceError, match="--num-cpus"):
        plan_passes(config(), [node("1", 0)])
    with pytest.raises(ResourceError, match="no node"):
        plan_passes(config(), [])


cards = st.tuples(st.integers(0, 32), st.integers(0, 4), st.integers(0, 48), st.integers(1, 200))


@settings(deadline=None, max_examples=500)
@given(st.lists(cards, min_size=1, max_size=6), st.integers(1, 4), st.sampled_from(["sidecar", "ollama"]))
def test_no_cluster_is_overbooked_or_asked_for_what_it_lacks(rows, per_gpu, backend):
    nodes = [
        node(str(number), cpus, vram * gpus, gpus=gpus, memory=memory, driver=number == 0)
        for number, (cpus, gpus, vram, memory) in enumerate(rows)
    ]
    make = captioned if backend == "ollama" else config
    settings_ = make(placement={"actors_per_gpu": per_gpu})
    try:
        steps, _ = plan_passes(settings_, nodes)
    except ResourceError:
        assert not any(place.cpus for place in nodes)
        return
    assert not overbooked(settings_, nodes)
    for step in steps:
        if step.device != "captions":
            # Ray must be able to start all of them at once: it waits for a pool's actors without a word
            room = sum(places(step, place) for place in nodes)
            assert 1 <= step.actors <= room


def places(step, place) -> int:
    if place.id in step.excluded:
        return 0
    counts = [int(place.cpus / step.cpus + 1e-9)]
    counts += [int(place.gpus) * int(1 / step.gpus)] if step.gpus else []
    counts += [int(place.vram_gb / step.vram_gb + 1e-9)] if step.vram_gb else []
    counts += [int(place.memory_gb / step.memory_gb + 1e-9)] if step.memory_gb else []
    return min(counts)


# --- caption servers --------------------------------------------------------------------------------------------------


def test_ollamas_memory_is_booked_on_the_node_that_serves():
    """Where the server was asked to unload and did not: else the card is free whenever a pass uses it."""
    alone = node("1", 16, 24, driver=True)
    steps, remarks = plan_passes(captioned(), [alone], loaded=True)
    assert any("20 GB of its GPU memory are kept for gemma3:27b" in remark for remark in remarks)
    assert shape(steps)[1] == (("dino", "pose"), "cuda")
    assert (steps[1].actors, steps[1].gpus) == (1, 1.0)  # 4 GB are left, and one worker takes 3.3
    steps, _ = plan_passes(captioned(placement={"vram_gb": {"captions": 0.0}}), [alone], loaded=True)
    assert steps[1].actors == 2
    steps, remarks = plan_passes(captioned(), [alone])
    assert steps[1].actors == 2
    assert remarks == []


@pytest.mark.parametrize("gb", [8, 12, 16])
def test_small_cards_encode_before_and_after_the_captions(gb):
    """Passes follow each other: what a caption model of 20 GB needs later is no reason to encode on CPUs now."""
    steps, remarks = plan_passes(captioned(), [node("1", 16, gb, driver=True)])
    assert shape(steps) == [
        (("px",), "cpu"), (("dino", "pose"), "cuda"), (("text",), "captions"), (("t5",), "cuda")
    ]  # fmt: skip
    assert remarks == []
    held, remarks = plan_passes(captioned(), [node("1", 16, gb, driver=True)], loaded=True)
    assert {step.device for step in held} == {"cpu", "captions"}
    assert any("runs on CPUs" in remark for remark in remarks)


def test_a_server_that_cannot_unload_keeps_its_memory_in_all_passes():
    openai = {"backend": "openai", "model": "m", "hosts": ["http://127.0.0.1:8000/v1"]}
    served = config(captions=openai, placement={"vram_gb": {"captions": 20.0}})
    steps, remarks = plan_passes(served, [node("1", 16, 24, driver=True)])
    assert steps[1].actors == 1
    assert any("20 GB of its GPU memory are kept for m" in remark for remark in remarks)
    assert plan_passes(config(captions=openai), [node("1", 16, 24, driver=True)])[0][1].actors == 2


def test_ollama_elsewhere_books_nothing_here():
    alone = node("1", 16, 24, driver=True)
    assert plan_passes(captioned(hosts=("http://192.0.2.7:11434",)), [alone])[0][1].actors == 2


def test_ollama_takes_the_roomiest_card_of_a_host_with_one_node_per_card():
    small = node("1", 8, 12, address="10.0.0.1", driver=True)
    large = node("2", 8, 24, address="10.0.0.1")
    steps, remarks = plan_passes(captioned(hosts=("http://10.0.0.1:11434",)), [small, large], loaded=True)
    assert steps[1].actors == 2  # one beside Ollama, one on the other card
    assert len([remark for remark in remarks if "are kept" in remark]) == 1


def test_the_caption_models_memory_comes_from_its_name():
    assert captions_vram(captioned()) == 20
    assert captions_vram(captioned("gemma3:12b-it-qat")) == pytest.approx(10.6)
    assert captions_vram(captioned("somebody/thing:latest")) == 20
    assert captions_vram(captioned(placement={"vram_gb": {"captions": 7.0}})) == 7
    assert captions_vram(config()) == 0  # sidecars
    assert captions_vram(config(placement={"vram_gb": {"captions": 7.0}})) == 0
    assert caption_hosts(config(), MIXED) == []


def test_only_hosts_on_nodes_of_the_run_are_asked_to_unload():
    hosts = ("http://localhost:11434", "http://10.0.0.2:11434", "http://192.0.2.7:11434")
    here = [node("1", 8, 12, driver=True), node("2", 8, 12)]
    assert caption_hosts(captioned(hosts=hosts), here) == list(hosts[:2])
    assert caption_hosts(captioned(hosts=hosts), here[1:]) == [hosts[1]]


def test_caption_hosts_are_recognised_by_name_and_address():
    here, there = node("1", driver=True), node("2")
    for url in ("http://localhost:11434", "localhost", "127.0.0.1:11434", "http://[::1]:11434"):
        assert serves(url, here)
        assert not serves(url, there)
    assert serves("http://host2:11434", there, resolve=lambda host: [])
    assert serves("http://captions.lan:11434", there, resolve=lambda host: ["10.0.0.2"])
    assert not serves("http://captions.lan:11434", here, resolve=lambda host: ["10.0.0.2"])


def test_a_caption_host_under_an_outer_address_of_this_machine_is_here():
    """A Ray of one's own knows its machine as 127.0.0.1 alone."""
    alone = local_node()
    assert serves("http://captions.lan:11434", alone, resolve=lambda host: ["127.0.0.7"])  # of Linux, like all of 127
    assert not serves("http://captions.lan:11434", alone, resolve=lambda host: ["198.51.100.7"])


# --- caption servers that a run starts --------------------------------------------------------------------------------


def auto(model: str = "gemma3:27b", **changes) -> PrepConfig:
    captions = {"backend": "ollama", "model": model, "hosts": "auto", "slots": 3} | changes.pop("captions", {})
    return config(captions=captions, **changes)


def seats_of(settings_: PrepConfig, nodes: list[Node]) -> tuple[list[tuple], list[str]]:
    """Node, cards, GB of GPU memory, CPUs and GB of main memory of each seat; the remarks."""
    remarks: list[str] = []
    seats, _ = caption_seats(settings_, nodes, remarks)
    assert all(seat.slots == 3 for seat in seats)
    return [(*seat.on, seat.gpus, seat.vram_gb, seat.cpus, seat.memory_gb) for seat in seats], remarks


def test_servers_of_the_config_are_asked_by_one_actor_where_the_driver_is():
    seats, joining = caption_seats(captioned(), MIXED, [])
    assert [(seat.slots, seat.demands()) for seat in seats] == [
        (1, {"num_cpus": 0.0, "num_gpus": 0.0, "label_selector": {"ray.io/node-id": "in(id-4)"}})
    ]
    assert joining is None


def test_every_card_that_holds_the_model_gets_a_server_and_no_other():
    two = node("6", 2, 48, gpus=2)
    seats, remarks = seats_of(auto(), [*MIXED, two])
    assert seats == [("id-1", 1, 20, 1, 0), ("id-6", 1, 20, 1, 0), ("id-6", 1, 20, 1, 0)]
    assert [remark for remark in remarks if "writes no captions on its GPU" in remark and "20 GB" in remark][1:]
    small, _ = seats_of(auto(placement={"vram_gb": {"captions": 9}}), MIXED)
    assert [seat[0] for seat in small] == ["id-1", "id-2", "id-3"]
    assert len(seats_of(auto(placement={"vram_gb": {"captions": 9}}, workers=2), MIXED)[0]) == 2
    (step,), _ = plan_passes(auto(layers=["text"]), MIXED, {"text"})
    assert (step.device, step.actors) == ("captions", 3)


def test_a_model_larger_than_a_card_takes_all_cards_of_its_node():
    seats, _ = seats_of(auto(), [node("7", 16, 24, gpus=2), SMALL])
    assert seats == [("id-7", 2, 24, 1, 0)]


def test_without_a_card_that_holds_it_cpus_caption_and_that_is_said():
    seats, remarks = seats_of(auto(), [SMALL, node("8", 6, memory=30), node("9", 4, memory=8)])
    assert seats == [("id-2", 0, 0, 8, 20), ("id-8", 0, 0, 6, 20)]
    assert any("written on CPUs" in remark for remark in remarks)
    assert seats_of(auto(placement={"device": "cpu"}), [BIG])[0] == [("id-1", 0, 0, 16, 20)]
    with pytest.raises(ResourceError, match="no more than 8 GB"):
        seats_of(auto(), [node("9", 4, memory=8)])
    with pytest.raises(ResourceError, match=r"placement\.device is cuda"):
        seats_of(auto(placement={"device": "cuda"}), [SMALL])


def test_machines_without_ollama_write_no_captions():
    without = replace(BIG, ollama=False)
    seats, remarks = seats_of(auto("gemma3:12b"), [without, SMALL])
    assert [seat[0] for seat in seats] == ["id-2"]
    assert any("host1" in remark and "has no Ollama" in remark for remark in remarks)
    with pytest.raises(ConfigError, match=r"no machine has Ollama .host1.*ollama\.com/download"):
        caption_seats(auto(), [without], [])


def test_a_node_that_joins_gets_a_server_too_and_none_that_was_there_a_second_one():
    joining = caption_seats(auto(), MIXED, [])[1]
    assert joining.demands() == {
        "num_cpus": 1.0, "num_gpus": 1.0, "resources": {"vram_gb": 20.0},
        "label_selector": {"ray.io/node-id": "!in(id-1, id-2, id-3, id-4)"},
    }  # fmt: skip


def test_own_servers_keep_no_memory_from_encoders():
    steps, remarks = plan_passes(auto(), [node("1", 16, 24, driver=True)], loaded=True)
    assert steps[1].actors == 2
    assert remarks == []


# --- Ray's description of the nodes -----------------------------------------------------------------------------------


def test_nodes_from_ray():
    raw = [
        {"NodeID": "b", "Alive": True, "NodeManagerAddress": "10.0.0.2", "NodeManagerHostname": "two",
         "Resources": {"CPU": 8.0, "GPU": 1.0, "vram_gb": 12.0, "memory": 3e10}},
        {"NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "one",
         "Resources": {"CPU": 4.0, "node:__internal_head__": 1.0}},
        {"NodeID": "c", "Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": {}},
    ]  # fmt: skip
    one, two = nodes_from_ray(raw)
    assert (one.id, one.cpus, one.gpus, one.driver) == ("a", 4, 0, True)
    assert (two.vram_gb, two.memory_gb, two.driver) == (12, 30, False)
    assert nodes_from_ray(raw, driver="b")[1].driver


def test_demo_workers_take_the_memory_that_there_is():
    demo = config(encoders="demo", layers=["dino"])
    (step,), remarks = plan_passes(demo, [node("1", cpus=8, memory=8)])
    assert (step.actors, step.memory_gb) == (int(8 / DEMO_WORKER_GB), DEMO_WORKER_GB)
    assert f"{step.actors} workers on 8 CPUs: each with px+dino takes {DEMO_WORKER_GB} GB of memory" in remarks
    (step,), _ = plan_passes(demo, [node("1", cpus=2, memory=8)])
    assert step.actors == 2

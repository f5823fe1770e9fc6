"""Models from the hub: one build per dataset, whatever the hub does afterwards. The client is the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from nanodit.errors import PROBLEM_BREAK, ConfigError, DataError
from nanodit.files import sha256_bytes, sha256_file
from prep.config import PrepConfig
from prep.doctor.models import TRY_OUT, check_downloads
from prep.encoders.demo import ASSETS, build_dino, build_t5
from prep.encoders.hub import Pin, Reference
from prep.encoders.pins import MODELS, other_networks, pin_config, read_pins, resolve_models, unknown_models, write_pins
from prep.encoders.registry import build_encoder, encoder_fingerprint, model_name
from prep.encoders.t5 import T5Encoder
from prep.encoders.weights import model_identity, open_model
from tests.prep.hub_server import HubServer, serve

T5, DINO, POSE = "google-t5/t5-large", "facebook/dinov3-vitl16-pretrain-lvd1689m", "yzd-v/DWPose"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_t5(folder / "t5", ("a", "red", "ball"))
    build_dino(folder / "dino")
    return folder


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    hub, server = serve()
    hub.push(T5, models / "t5")
    hub.push(DINO, models / "dino")
    networks = {"yolox_l.onnx": "demo_yolox.onnx", "dw-ll_ucoco_384.onnx": "demo_dw_ll.onnx"}
    hub.push(POSE, {name: (ASSETS / own).read_bytes() for name, own in networks.items()})
    # what HF_ENDPOINT and HF_HOME set when huggingface_hub is imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path) -> PrepConfig:
    return PrepConfig(source="photos", output=str(tmp_path / "dataset"))


def pinned(config: PrepConfig) -> PrepConfig:
    """What a run does at its start."""
    pins = resolve_models(config, read_pins(config.output))
    write_pins(config.output, pins)
    return pin_config(config, pins)


def test_the_first_run_records_commits_and_hashes_and_later_runs_keep_them(
    hub: HubServer, config: PrepConfig, models: Path, tmp_path: Path
) -> None:
    first = pinned(config)
    recorded = json.loads((tmp_path / "dataset" / MODELS).read_text())
    assert set(recorded) == {T5, DINO, f"{POSE}:yolox_l.onnx", f"{POSE}:dw-ll_ucoco_384.onnx"}
    assert recorded[T5]["revision"] == hub.branches[T5, "main"]
    assert recorded[T5]["files"]["model.safetensors"] == sha256_file(models / "t5" / "model.safetensors")
    assert str(tmp_path) not in json.dumps(recorded)
    before = {layer: encoder_fingerprint(first, layer) for layer in ("t5", "dino", "pose")}
    assert before["t5"]["revision"] == recorded[T5]["revision"]
    assert before["pose"]["detector"] == sha256_file(ASSETS / "demo_yolox.onnx")

    # main moves, with other weights: the dataset stays with what it was made with
    files = dict(hub.commits[T5, hub.branches[T5, "main"]])
    hub.push(T5, files | {"model.safetensors": b"retrained"})
    hub.push(POSE, {"yolox_l.onnx": b"other", "dw-ll_ucoco_384.onnx": b"other"})
    hub.requests.clear()
    second = pinned(config)
    assert second == first
    assert not hub.requests  # nothing is asked, let alone downloaded, for what is recorded
    encoder = build_encoder(second, "t5", "cpu")
    assert encoder.fingerprint() == before["t5"]
    assert encoder.encode(["A red ball."])[0].embedding.shape == (5, 128)
    # a dataset of its own takes today's
    other = resolve_models(config, {})
    assert other[T5].revision == hub.branches[T5, "main"] != recorded[T5]["revision"]


def test_a_main_that_moves_during_the_first_download_mixes_nothing(hub: HubServer, config: PrepConfig) -> None:
    old = hub.branches[T5, "main"]
    files = dict(hub.commits[T5, old])
    hub.after["config.json"] = lambda: hub.push(T5, files | {"model.safetensors": b"retrained"})
    pin = resolve_models(config, {})[T5]
    assert pin.revision == old != hub.branches[T5, "main"]
    assert pin.files["model.safetensors"] == sha256_bytes(files["model.safetensors"])


def test_a_pinned_config_is_all_that_another_machine_needs(
    hub: HubServer, config: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pinned(config)
    assert pin_config(first, {}) == first  # complete in itself: no models.json is read
    assert resolve_models(first, {}) == {}
    moved = dict(hub.commits[DINO, hub.branches[DINO, "main"]])
    hub.push(DINO, moved | {"model.safetensors": b"moved on"})
    script = """
import sys
from prep.encoders.registry import build_encoder
from nanodit.files import canonical_json
from prep.config import PrepConfig
config = PrepConfig.model_validate_json(sys.stdin.read())
print(canonical_json({layer: build_encoder(config, layer, "cpu").fingerprint() for layer in ("dino", "pose")}))
"""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere"), "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], input=first.model_dump_json(), env=environment | {"PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {layer: encoder_fingerprint(first, layer) for layer in ("dino", "pose")}


def test_offline_the_cache_serves_recorded_models_and_new_datasets(
    hub: HubServer, config: PrepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pinned(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert build_encoder(first, "t5", "cpu").fingerprint() == encoder_fingerprint(first, "t5")
    assert resolve_models(config, {}) == read_pins(config.output)  # the cached main
    assert not hub.requests
    unknown = config.model_copy(update={"t5": config.t5.model_copy(update={"model": "org/never-downloaded"})})
    with pytest.raises(ConfigError, match=r"org/never-downloaded: config\.json is not in the local cache.*HF_HOME"):
        resolve_models(unknown, {})


def test_a_hub_that_fails_is_not_taken_for_a_model_without_the_file(
    hub: HubServer, config: PrepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    hub.broken.add("tokenizer_config.json")  # which a model may do without
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json.*cannot be reached"):
        resolve_models(config, {})
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "empty")
    with pytest.raises(ConfigError, match=r"config\.json is not in the local cache.*cannot be reached"):
        resolve_models(config, {})


def test_other_bytes_under_a_recorded_commit_are_refused(
    hub: HubServer, config: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pinned(config)
    # in the cache of this machine
    weights = next((tmp_path / "cache").glob("models--google-t5*/snapshots/*/model.safetensors"))
    good = weights.read_bytes()
    weights.resolve().write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"t5-large@\w{40}:model.safetensors: .* recorded at the first download"):
        build_encoder(first, "t5", "cpu")
    weights.resolve().write_bytes(good)
    build_encoder(first, "t5", "cpu")
    # and on the hub, for a machine that has to download
    hub.commits[POSE, hub.branches[POSE, "main"]]["yolox_l.onnx"] += b"\0"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    with pytest.raises(ConfigError, match=r"models\.json"):
        build_encoder(first, "pose", "cpu")


def test_gated_models_name_the_licence_and_the_login(
    hub: HubServer, config: PrepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated[DINO] = {"granted"}
    for token in ("", "hf_without_access"):  # 401 and 403
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigError) as caught:
            resolve_models(config, {})
        assert f"licence at https://huggingface.co/{DINO}" in str(caught.value)
        assert "hf auth login" in str(caught.value)
        assert "production-ungated.yaml" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "granted")
    assert resolve_models(config, {})[DINO].revision == hub.branches[DINO, "main"]


def test_wrong_names_are_explained(hub: HubServer, config: PrepConfig) -> None:
    def asking(**given: str) -> PrepConfig:
        return config.model_copy(update={"t5": config.t5.model_copy(update=given), "layers": ["text"]})

    for given, message in (
        ({"model": "google-t5/t5-lagre"}, "no model at https://huggingface.co/google-t5/t5-lagre"),
        ({"model": "models/t5/large"}, "neither a folder"),
        ({"revision": "v2"}, "no revision v2"),
        ({"sha256": {"model.safetensors": "00"}}, r"t5\.revision to its 40 digits"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_models(asking(**given), {})
    hub.push("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        resolve_models(asking(model="org/pickled"), {})


def test_sharded_weights_are_recorded_whole(hub: HubServer, config: PrepConfig) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = dict.fromkeys(index["weight_map"].values(), b"weights")
    hub.push("org/large", {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()} | shards)
    hub.commits["org/large", hub.branches["org/large", "main"]] |= {"README.md": b"", "pytorch_model.bin": b""}
    large = config.model_copy(
        update={"dino": config.dino.model_copy(update={"model": "org/large"}), "layers": ["dino"]}
    )
    assert set(resolve_models(large, {})["org/large"].files) == {"config.json", "model.safetensors.index.json", *shards}


def test_a_revision_that_the_config_names_is_recorded_by_itself(hub: HubServer, config: PrepConfig) -> None:
    old = hub.branches[T5, "main"]
    files = dict(hub.commits[T5, old])
    new = hub.push(T5, files | {"spiece.model": b"new"})
    hub.branches[T5, "v1"] = old
    asked = config.model_copy(update={"t5": config.t5.model_copy(update={"revision": "v1"})})
    assert pinned(config).t5.revision == new
    assert pinned(asked).t5.revision == old
    hub.branches[T5, "v1"] = new
    assert pinned(asked).t5.revision == old
    assert {f"{T5}@v1", T5} < set(read_pins(config.output))


def test_local_models_need_no_record(config: PrepConfig, models: Path, tmp_path: Path) -> None:
    given = {"t5": {"model": str(models / "t5")}, "dino": {"model": str(models / "dino")}}
    paths = {"detector": str(ASSETS / "demo_yolox.onnx"), "pose": str(ASSETS / "demo_dw_ll.onnx")}
    local = PrepConfig(source="photos", output=config.output, pose=paths, **given)
    demo = PrepConfig(source="photos", output=config.output, encoders="demo")
    for settings in (local, demo):
        assert pinned(settings) == settings
    assert not (tmp_path / "dataset").exists()
    for settings in (local, demo):  # trap 9: no key without an effect
        hashed = settings.t5.model_copy(update={"sha256": {"config.json": "00"}})
        with pytest.raises(ConfigError, match=r"t5\.sha256 is only for models from the hub"):
            pinned(settings.model_copy(update={"t5": hashed}))
    assert "content" in encoder_fingerprint(local, "t5")


def test_files_in_the_models_folder_come_before_the_hub(
    hub: HubServer, config: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub = pinned(config)
    assert other_networks(on_hub)[0].startswith("yzd-v/DWPose@")  # the demo's networks under the published names
    (tmp_path / "models").mkdir()
    for name, own in (("yolox_l.onnx", "demo_yolox.onnx"), ("dw-ll_ucoco_384.onnx", "demo_dw_ll.onnx")):
        (tmp_path / "models" / name).write_bytes((ASSETS / own).read_bytes())
    local = pinned(config)
    assert local.pose.detector == str(tmp_path / "models" / "yolox_l.onnx")
    # the same bytes are the same layer, wherever they come from
    assert encoder_fingerprint(local, "pose") == encoder_fingerprint(on_hub, "pose")
    assert model_name(local, "pose", {}) == model_name(on_hub, "pose", {}) == "dwpose"
    assert len(other_networks(local)) == 2
    assert "dw-ll_ucoco_384.onnx" in other_networks(local)[1]
    image = np.zeros((1, 64, 64, 3), np.uint8)
    assert build_encoder(local, "pose", "cpu").detect(image)[0].persons == 0


def test_words_are_read_once_for_all_machines_and_passes(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("pear apple")
    config = PrepConfig(source="a", output="b", encoders="demo", t5={"words": str(tmp_path / "words.txt")})
    first = pin_config(config, {})
    (tmp_path / "words.txt").write_text("quince")
    assert first.t5.words == ["apple", "pear"]
    assert pin_config(first, {}) == first


def test_a_plan_before_the_first_download_asks_nobody(config: PrepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    unknown = pin_config(config, {})
    assert encoder_fingerprint(unknown, "t5")["revision"] == "main"
    assert encoder_fingerprint(unknown, "pose")["detector"] == "yzd-v/DWPose:yolox_l.onnx"


def test_direct_use_finds_the_build_that_a_dataset_names(hub: HubServer, config: PrepConfig) -> None:
    recorded = encoder_fingerprint(pinned(config), "t5")
    hub.push(T5, {"config.json": b"moved"})
    assert T5Encoder(recorded["model"], recorded["revision"]).fingerprint() == recorded


def test_damaged_records_are_not_guessed(config: PrepConfig, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / MODELS).write_text('{"a/b": {"commit": 1}}')
    with pytest.raises(DataError, match=r"models\.json is damaged"):
        read_pins(config.output)


def test_references_and_identities() -> None:
    for text in ("a/b", "a/b@v1", "a/b:c.onnx", "a/b@0f:d/c.onnx"):
        assert str(Reference.parse(text)) == text
    pin = Pin("0" * 40, {"config.json": "1", "model.safetensors": "2"})
    identity = model_identity("a/b", pin.revision, pin.files)
    assert identity["revision"] == pin.revision
    assert identity["sha256"] != model_identity("a/b", pin.revision, pin.files | {"model.safetensors": "3"})["sha256"]


def test_all_models_are_asked_for_before_any_is_downloaded(
    hub: HubServer, config: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check_downloads(config, unknown_models(config, {}))
    assert not (tmp_path / "cache").exists()
    assert all(line.startswith("training will need ") for line in found)
    assert "VGG-16" in " ".join(found) or (Path.home() / ".cache/torch/hub/checkpoints/vgg16-397923af.pth").is_file()
    wrong = config.model_copy(update={"dino": config.dino.model_copy(update={"model": "org/nowhere"})})
    wrong = wrong.model_copy(update={"t5": wrong.t5.model_copy(update={"revision": "0" * 40})})
    with pytest.raises(ConfigError) as error:
        check_downloads(wrong, unknown_models(wrong, {}))
    first, *problems, remedy = str(error.value).split(PROBLEM_BREAK)
    assert first == "2 of 4 models cannot be had, and nothing was downloaded"
    assert [problem.split()[0] for problem in problems] == [T5, "the"]
    assert "org/nowhere" in problems[1]
    assert remedy == f"To try the rest without them: --config {TRY_OUT} source=photos base=64"
    assert not (tmp_path / "cache").exists()


def test_a_commit_that_is_in_the_cache_needs_no_hub(hub: HubServer, config: PrepConfig) -> None:
    pin = resolve_models(config, {})[T5]
    hub.commits.clear()  # nothing can be had any more
    folder, (_, revision, files) = open_model(T5, pin.revision)
    assert (folder / "config.json").is_file()
    assert (revision, files) == (pin.revision, pin.files)

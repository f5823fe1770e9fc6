"""``train sample``: prompts, references, poses and stored conditions in, pictures with their settings out.

The encoders are the demo ones, the model is a real one of six training steps on the figures.
"""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from nanodit.errors import DataError
from nanodit.rng import noise
from prep.dataset.buckets import Bucket
from prep.dataset.reader import Dataset
from prep.encoders.demo import build_demo_encoders, demo_folder
from prep.encoders.dinov3 import DINOv3Encoder
from prep.encoders.dwpose import denormalise
from prep.encoders.t5 import T5Encoder
from tests.prep.hub_server import serve
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main
from train.data.samples import load_conditions
from train.draw import draw as draw_module
from train.draw import request as given_module
from train.draw.draw import DrawRequest
from train.draw.request import Given, check_encoder, encode, encoding_size
from train.method.sampling import DRAWING, Sampling

# text + DINO without a pose, and a pose without text, are never trained
TABLE = "{nothing: 0.2, text: 0.2, text+pose: 0.2, cls+patches: 0.2, all: 0.2}"
PROMPT = "A woman in a red top."


@pytest.fixture(scope="module")
def run(figures_dataset, tmp_path_factory) -> Path:
    """A run folder on the figures, whose model listens to its conditions."""
    folder = tmp_path_factory.mktemp("draw")
    path = write_config(folder / "c.yaml", figures_dataset, folder / "run")
    overrides = ["conditioning.preset=null", f"conditioning.table={TABLE}", "train.lr=1e-2", "train.steps=6"]
    assert main(["run", "--config", str(path), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def dataset(run) -> dict:
    """What its checkpoint says of the data."""
    return json.loads((run / "checkpoints" / "step-000006" / "state.json").read_text())["dataset"]


@pytest.fixture(scope="module")
def rows(figures_dataset) -> list[dict]:
    """Holdout samples, one of each shape that there is."""
    return list({row["bucket"]: row for row in Dataset(figures_dataset).rows("holdout")}.values())


@pytest.fixture(scope="module")
def figure(figures_folder, rows) -> Path:
    """The source file of a holdout sample that is not square."""
    return figures_folder / next(row["source"] for row in rows if row["bucket"] != "64x64")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face hub on this machine, with an empty cache."""
    hub, server = serve()
    # what HF_ENDPOINT and HF_HOME set when huggingface_hub is imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.chdir(tmp_path)  # models/ of the working directory comes before the hub
    yield hub
    server.shutdown()
    server.server_close()


def sample(run: Path, output: Path, *arguments: str) -> int:
    return main(["sample", "--checkpoint", str(run), "--output", str(output), "--steps", "2", *map(str, arguments)])


def settings_of(path: Path) -> dict:
    return json.loads(Image.open(path).text["nanodit"])


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# --- what is given ----------------------------------------------------------------------------------------------------


def test_what_is_given_is_encoded_as_the_dataset_was(figures_dataset, figures_folder, dataset, rows):
    """A holdout sample's own picture and caption give the conditions that are stored of it."""
    stored_in = Dataset(figures_dataset)
    for row in rows:
        picture = figures_folder / row["source"]
        given = Given.read([row["caption"]], picture, picture)
        size = Bucket.parse(row["bucket"])
        assert given.bucket(64) == size
        ours = encode(given, given.subset, dataset, (size.width, size.height), torch.device("cpu"))
        stored = load_conditions(stored_in, [row])
        assert torch.equal(ours.keep, stored.keep)
        torch.testing.assert_close(ours.pose, stored.pose, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.cls, stored.cls, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.patches, stored.patches, atol=0.05, rtol=0)  # a last bit may round elsewhere
        assert (ours.patches == stored.patches).float().mean() > 0.99
        mask = stored.text_mask
        assert torch.equal(ours.text_mask, mask)
        torch.testing.assert_close(ours.text[mask], stored.text[mask], atol=2e-3, rtol=2e-3)


def test_a_pose_means_the_same_as_image_and_as_json(dataset, figure, rows, figures_dataset, tmp_path):
    """Joints found in the crop, written as JSON, are the same condition."""
    row = next(row for row in rows if row["source"] == figure.name)
    size = Bucket.parse(row["bucket"])
    joints = denormalise(Dataset(figures_dataset).pose(row), size.width, size.height)
    path = tmp_path / "pose.JSON"
    path.write_text(json.dumps({"width": size.width, "height": size.height, "keypoints": joints.tolist()}))
    written, shown = Given.read(pose=path), Given.read(pose=figure)
    assert written.bucket(64) == shown.bucket(64) == size
    for picture in (size, size.transposed, Bucket(96, 64)):
        target = picture.width, picture.height
        a, b = (encode(given, given.subset, dataset, target, torch.device("cpu")).pose for given in (written, shown))
        assert a.shape == (1, 133, 3)
        if picture == size:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        else:  # cropped to another shape, where the detector looks anew
            both = (a[..., 2] > 0.5) & (b[..., 2] > 0.5)
            assert both[:, :17].float().mean() > 0.3
            assert (a - b)[..., :2][both].abs().median() < 0.1


def test_reference_and_pose_keep_the_datasets_scale():
    assert encoding_size(80, 48, 64) == Bucket(80, 48)
    assert encoding_size(48, 88, 64) == Bucket(48, 88)
    assert encoding_size(128, 128, 64) == Bucket(64, 64)
    assert encoding_size(160, 96, 64) == Bucket(83, 50)
    assert encoding_size(1536, 640, 1024) == Bucket(1586, 661)


def test_every_encoder_is_gone_before_the_next_and_before_the_model(run, figure, tmp_path, monkeypatch, capsys):
    alive, order = [], []
    real_build, real_to = given_module.build_encoder, torch.nn.Module.to

    def build(config, layer, device):
        gc.collect()
        assert not any(reference() for reference in alive), "the encoder before it is still in memory"
        encoder = real_build(config, layer, device)
        alive.append(weakref.ref(encoder))
        order.append(layer)
        return encoder

    def to(module, *arguments, **more):
        if type(module).__name__ == "NanoDiT":
            assert not any(reference() for reference in alive), "an encoder is in memory beside the model"
            order.append("model")
        return real_to(module, *arguments, **more)

    monkeypatch.setattr(given_module, "build_encoder", build)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    everything = ["--prompt", PROMPT, "--reference", figure, "--pose", figure]
    assert sample(run, tmp_path / "a.png", *everything) == 0
    assert order == ["t5", "dino", "pose", "model"]
    said = capsys.readouterr().out
    for words in ("loading T5 (demo) for the prompt", "loading DINO (demo) for the ref", "loading DWPose (demo) for"):
        assert words in said
    order.clear()
    assert sample(run, tmp_path / "b.png", *everything, "--conditions", "text,pose") == 0
    assert order == ["t5", "pose", "model"], "what is not used is not loaded"


def test_a_reference_has_two_names_and_a_checkpoint_may_be_a_run(run, figure, tmp_path, monkeypatch):
    drawn = set()
    step = run / "checkpoints" / "step-000006"
    for number, checkpoint in enumerate((run, run / "checkpoints", step)):
        for option in ("--reference", "--reference-image"):
            assert sample(checkpoint, tmp_path / f"{number}.png", option, figure) == 0
            drawn.add((tmp_path / f"{number}.png").read_bytes())
    for folder, given in ((run, "."), (run / "checkpoints", "."), (run / "checkpoints", step.name), (step, ".")):
        monkeypatch.chdir(folder)
        assert sample(given, tmp_path / "here.png", "--reference", figure) == 0
        drawn.add((tmp_path / "here.png").read_bytes())
    assert len(drawn) == 1


def test_another_encoder_is_refused_with_a_remedy(run, figure, tmp_path, capsys):
    encoders = build_demo_encoders(demo_folder())
    other = tmp_path / "other"
    other.mkdir()
    for file in encoders.t5.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert sample(run, tmp_path / "a.png", "--prompt", PROMPT, "--encoder", f"t5={other}") == 0, "equal content"
    (other / "README.md").write_text("another model")
    assert sample(run, tmp_path / "x.png", "--prompt", PROMPT, "--encoder", f"t5={other}") == 3
    message = capsys.readouterr().err
    assert "the prompt's encoder (T5) did not make the training data: content " in message
    assert "as --encoder t5=FOLDER" in message
    arguments = ["--prompt", PROMPT, "--pose", figure]
    assert sample(run, tmp_path / "x.png", *arguments, "--encoder", f"pose={encoders.detector}") == 3
    assert "--encoder detector=FILE --encoder pose=FILE" in capsys.readouterr().err
    assert sample(run, tmp_path / "x.png", *arguments, "--encoder", f"clip={other}") == 2
    assert "--encoder clip: unknown; name one of t5, dino, detector, pose" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_models_are_taken_from_the_hub_as_they_were(dataset, figure, hub):
    """A dataset made with the hub's models names them; what the hub's main became since does not matter."""
    ours = build_demo_encoders(demo_folder())
    hub.push("me/t5", ours.t5)
    hub.push("me/dino", ours.dino)
    hub.push(
        "yzd-v/DWPose", {"yolox_l.onnx": ours.detector.read_bytes(), "dw-ll_ucoco_384.onnx": ours.pose.read_bytes()}
    )
    layers = {
        "t5": {"encoder": T5Encoder("me/t5").fingerprint()},
        "dino": {"encoder": DINOv3Encoder("me/dino", input_scale=1.0).fingerprint()},
        "pose": dataset["layers"]["pose"],
    }
    assert "content" not in {**layers["t5"]["encoder"], **layers["dino"]["encoder"]}
    hub.push("me/t5", {"config.json": b"{}"})
    given = Given.read([PROMPT], figure, figure)
    there, here = (
        encode(given, given.subset, about, (80, 56), torch.device("cpu"))
        for about in ({"base": 64, "encoders": "production", "layers": layers}, dataset)
    )
    for name in ("text", "cls", "patches", "pose"):
        assert torch.equal(getattr(there, name), getattr(here, name))


def test_another_version_of_an_encoder_is_not_blamed_on_its_folder():
    with pytest.raises(DataError, match=r"code 1 there, 2 here\. The dataset was prepared by another version"):
        check_encoder("pose", {"encoder": "dwpose", "code": 2}, {"encoder": "dwpose", "code": 1})


def test_what_a_file_does_not_show_is_said(run, figure, tmp_path, capsys):
    Image.new("RGB", (96, 64), "grey").save(tmp_path / "wall.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.json").write_text('{"people": [], "canvas_width": 64, "canvas_height": 64}')
    for arguments, code, message in (
        (["--pose", tmp_path / "wall.png"], 3, "--pose: no person was found in that image"),
        (["--pose", tmp_path / "empty.json"], 3, "empty.json: holds no joint"),
        (["--pose", tmp_path / "notes.txt"], 3, "notes.txt: "),
        (["--reference", tmp_path / "notes.txt"], 3, "notes.txt: "),
        (["--reference", tmp_path / "none.png"], 2, "none.png: No such file"),
        (["--reference", tmp_path], 2, "Is a directory"),
    ):
        assert sample(run, tmp_path / "x.png", "--prompt", PROMPT, *arguments) == code
        assert message in capsys.readouterr().err
    Image.new("RGB", (9, 6), "grey").save(tmp_path / "small.png")
    assert sample(run, tmp_path / "x.png", "--reference", tmp_path / "small.png") == 0
    assert "warning: --reference is enlarged 9.3 times to 80x56" in capsys.readouterr().out


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_an_image_with_its_settings(run, tmp_path, capsys):
    assert sample(run, tmp_path / "a.png", "--prompt", PROMPT, "--seed", "3") == 0
    assert f"wrote {tmp_path / 'a.png'}" in capsys.readouterr().out.splitlines()[-1]
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    settings = settings_of(tmp_path / "a.png")
    expected = {"prompt": PROMPT, "seed": 3, "sampler": "dpm++2m", "steps": 2, "conditions": "text", "size": "64x64"}
    assert settings | expected == settings
    assert "step 6 (ema)" in settings["checkpoint"]
    sample(run, tmp_path / "b.png", "--prompt", PROMPT, "--seed", "3")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sample(run, tmp_path / "c.png", "--prompt", PROMPT, "--seed", "4")
    assert (pixels_of(tmp_path / "c.png") != pixels_of(tmp_path / "b.png")).mean() > 0.5
    sample(run, tmp_path / "d.png", "--prompt", "A man in a blue top.", "--seed", "3")
    assert (pixels_of(tmp_path / "d.png") != pixels_of(tmp_path / "a.png")).any()


def test_the_settings_in_a_file_draw_it_again(run, figure, figures_folder, tmp_path):
    """Every option that a picture depends on is in it: a command made from that alone gives the same bytes."""
    asked = ["--prompt", PROMPT, "--prompt", "A man.", "--reference", figure, "--pose", figure, "--size", "96x64"]
    how = ["--sampler", "dpm++2m", "--steps", "3", "--guidance", "2", "--guidance-interval", "0.2", "0.7"]
    assert sample(run, tmp_path / "a.png", *asked, *how, "--weights", "model", "--seed", "7", "--batch-size", "1") == 0
    is_ = settings_of(tmp_path / "a-1.png")
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in figures_folder.glob("*.png")}
    again = DrawRequest(
        tmp_path / "b.png", (is_["prompt"],), files[is_["reference"]["sha256"]], files[is_["pose"]["sha256"]],
        conditions=is_["conditions"], seed=is_["seed"], size=tuple(map(int, is_["size"].split("x"))),
        sampling=Sampling(
            is_["sampler"], is_["steps"], is_["guidance"], is_["scales"], is_["self_guidance"], tuple(is_["interval"]),
            is_["grid"],
        ),
        weights=is_["weights"],
    )  # fmt: skip
    draw_module.draw(run, again, torch.device(is_["device"]))
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-1.png").read_bytes()


def test_everything_that_is_given_changes_the_picture(run, figure, tmp_path):
    drawn = {}
    for name, arguments in {
        "text": ["--prompt", PROMPT],
        "cls+patches": ["--reference", figure],
        "text+pose": ["--prompt", PROMPT, "--pose", figure],
        "all": ["--prompt", PROMPT, "--reference", figure, "--pose", figure],
        "nothing": ["--conditions", "nothing"],
    }.items():
        output = tmp_path / f"{name}.png"
        assert sample(run, output, *arguments, "--size", "80x48") == 0
        settings = settings_of(output)
        assert settings["conditions"] == name
        assert ("reference" in settings) == (name in ("cls+patches", "all"))
        drawn[name] = pixels_of(output).tobytes()  # not the file, which holds the settings
    assert len(set(drawn.values())) == len(drawn)
    assert settings_of(tmp_path / "all.png")["pose"]["name"] == figure.name
    assert len(settings_of(tmp_path / "all.png")["pose"]["sha256"]) == 64


def test_the_shape_is_that_of_what_is_given(run, figure, tmp_path, rows):
    bucket = Bucket.parse(next(row["bucket"] for row in rows if row["source"] == figure.name))
    Image.new("RGB", (300, 300), "grey").save(tmp_path / "square.png")
    for name, arguments, size in (
        ("pose", ["--prompt", PROMPT, "--pose", figure], (bucket.width, bucket.height)),
        ("first", ["--prompt", PROMPT, "--pose", figure, "--reference", tmp_path / "square.png"], None),
        ("reference", ["--reference", tmp_path / "square.png"], (64, 64)),
        ("bucket", ["--reference", tmp_path / "square.png", "--bucket", "48x88"], (48, 88)),
        ("size", ["--reference", tmp_path / "square.png", "--size", "96x40"], (96, 40)),
    ):
        assert sample(run, tmp_path / f"{name}.png", *arguments) == 0
        assert Image.open(tmp_path / f"{name}.png").size == (size or (bucket.width, bucket.height))


def test_prompts_and_seeds_in_batches_and_on_a_sheet(run, figure, tmp_path, capsys):
    prompts = [PROMPT, "A man in a long blue coat, seen from the side, holds a green umbrella.", "A child."]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n\n" for prompt in prompts[1:]), "utf-8-sig")  # with a BOM
    shared = ["--pose", figure, "--guidance", "60"]  # so strong that the words of a prompt show after six steps
    many = ["--prompt", PROMPT, "--prompts", tmp_path / "prompts.txt", *shared, "--count", "2", "--seed", "5"]
    out = tmp_path / "out"
    assert sample(run, out / "a.png", *many, "--batch-size", "4", "--grid") == 0
    names = [f"a-{prompt}-{seed}.png" for prompt in (1, 2, 3) for seed in (5, 6)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "a-grid.png"])
    assert "wrote 7 files" in capsys.readouterr().out.splitlines()[-1]
    assert settings_of(out / "a-2-6.png")["prompt"] == prompts[1]
    sheet = settings_of(out / "a-grid.png")
    assert (sheet["prompts"], sheet["seeds"]) == (prompts, [5, 6])
    # every picture stands on it, enlarged, a row per prompt and a column per seed
    grid, small = pixels_of(out / "a-grid.png"), pixels_of(out / "a-2-6.png")
    height, width = small.shape[0] * 2, small.shape[1] * 2
    for row, column in np.ndindex(3, 2):
        large = pixels_of(out / f"a-{row + 1}-{column + 5}.png").repeat(2, 0).repeat(2, 1)
        top, left = 16 + 4 + row * (height + 4), 84 + 4 + column * (width + 4)
        assert np.array_equal(grid[top : top + height, left : left + width], large)
    # a picture does not depend on what is drawn with it, nor on the size of the batch
    assert sample(run, out / "alone.png", "--prompt", prompts[1], *shared, "--seed", "6") == 0
    assert np.abs(pixels_of(out / "alone.png") - small).max() <= 1
    assert sample(run, out / "b.png", *many, "--batch-size", "1") == 0
    assert np.abs(pixels_of(out / "b-2-6.png") - small).max() <= 1


def test_a_holdout_samples_conditions(run, rows, figures_dataset, tmp_path, capsys):
    row = next(row for row in rows if row["bucket"] != "64x64")
    for conditions in ("text,pose", "all"):
        output = tmp_path / f"{conditions}.png"
        assert sample(run, output, "--key", row["key"], "--conditions", conditions) == 0
        assert "x".join(map(str, Image.open(output).size)) == row["bucket"]
    assert settings_of(tmp_path / "text,pose.png")["conditions"] == "text+pose"
    assert settings_of(tmp_path / "all.png")["key"] == row["key"]
    training = Dataset(figures_dataset).rows("train")[0]["key"]
    assert sample(run, tmp_path / "x.png", "--key", training) == 2
    assert "not a holdout sample" in capsys.readouterr().err


def test_trap_22_the_noise_is_keyed_by_sample_and_seed(run, rows, tmp_path, monkeypatch):
    starts = []
    real = draw_module.sample
    monkeypatch.setattr(draw_module, "sample", lambda m, c, start, **k: starts.append(start) or real(m, c, start, **k))
    for conditions in ("text", "text,pose"):
        sample(run, tmp_path / "x.png", "--key", rows[0]["key"], "--conditions", conditions, "--seed", "9")
    width, height = map(int, rows[0]["bucket"].split("x"))
    for start in starts:
        assert np.array_equal(start[0].numpy(), noise(rows[0]["key"], 9, height, width))  # trap 22
    assert len(starts) == 2


# --- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sampling"),
    [
        ([], DRAWING),
        (
            ["--sampler", "heun", "--steps", "9", "--guidance", "3"],
            replace(DRAWING, method="heun", steps=9, guidance=3.0),
        ),
        (
            ["--scale", "text=3", "--scale", "dino=1.5", "--guidance-interval", "0.1", "0.8"],
            replace(DRAWING, scales={"text": 3.0, "dino": 1.5}, interval=(0.1, 0.8)),
        ),
        (["--self-guidance", "2"], replace(DRAWING, self_guidance=2.0)),
        (["--steps", "10", "--time-grid", "uniform"], replace(DRAWING, steps=10, grid="uniform")),
        (["--self-guidance", "--sampler", "euler"], replace(DRAWING, method="euler", self_guidance=3.0)),
        (["--precision", "bf16"], replace(DRAWING, precision="bf16")),
    ],
)
def test_the_flags_say_how_to_sample(arguments, sampling, tmp_path, monkeypatch):
    requests: list[DrawRequest] = []
    monkeypatch.setattr(draw_module, "draw", lambda checkpoint, request, device: requests.append(request) or [Path()])
    asked = ["sample", "--checkpoint", "run", "--output", str(tmp_path / "x.png"), "--prompt", "x", *arguments]
    assert main(asked) == 0
    assert requests[0].sampling == sampling


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conditions", "pose"], "conditions pose: never trained by this run's dropout table"),
        (["--conditions", "text,cls"], "conditions text+cls: never trained"),
        (["--conditions", "text,hair"], "unknown hair"),
        (["--size", "60x64"], "multiples of the patch size, 8"),
        (["--size", "0x64"], "multiples of the patch size, 8"),
        (["--size", "big"], "not of the form WIDTHxHEIGHT"),
        (["--size", "6\u00b2x64"], "not of the form WIDTHxHEIGHT"),
        (["--bucket", "64x96"], "--bucket 64x96: base 64 has 64x64, 80x56, 56x80"),
        (["--steps", "0"], "steps 0: must be at least 1"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--guidance", "nan"], "guidance nan: must be a number"),
        (["--guidance", "-1"], "guidance -1.0: must be a number"),
        (["--self-guidance", "inf"], "self-guidance inf: must be a number"),
        (["--self-guidance"], "self-guidance: this model was trained without routing"),
        (["--scale", "text"], "--scale text: not of the form NAME=NUMBER"),
        (["--scale", "text=much"], "--scale text=much: not of the form NAME=NUMBER"),
        (["--scale", "text=2", "--scale", "text=3"], "--scale text=3: text is given twice"),
        (["--scale", "hair=2"], "unknown"),
        (["--encoder", "t5"], "--encoder t5: not of the form NAME=PLACE"),
        (["--output", "picture.jpg"], "--output picture.jpg: must be a file named *.png"),
        (["--output", "picture"], "must be a file named *.png"),
        (["--prompt", "x"], "--prompt: --key takes all conditions from the holdout sample"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(run, rows, tmp_path, arguments, message, capsys):
    assert sample(run, tmp_path / "x.png", "--key", rows[0]["key"], *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_what_was_never_trained_is_refused_whatever_gives_it(run, figure, tmp_path, capsys):
    for arguments, name in (
        (["--pose", figure], "pose"),
        (["--prompt", PROMPT, "--reference", figure], "text+cls+patches"),
        (["--reference", figure, "--pose", figure], "cls+patches+pose"),
    ):
        assert sample(run, tmp_path / "x.png", *arguments) == 2
        captured = capsys.readouterr()
        assert f"conditions {name}: never trained" in captured.err
        assert "loading" not in captured.out, "refused before seconds are spent on encoders"
    assert sample(run, tmp_path / "x.png", "--prompt", PROMPT, "--conditions", "text,pose") == 2
    assert "--conditions text+pose: no pose is given; add --pose" in capsys.readouterr().err


def test_a_senseless_request_is_refused_before_the_checkpoint_is_read(tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "none.txt").write_text("\n \n")
    for arguments, message in (
        (["--prompt", "x", "--output", tmp_path / "folder.png"], "folder.png: must be a file"),
        (["--prompt", "x", "--dataset", tmp_path], "--dataset: says where the holdout sample of --key is"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompts", tmp_path / "none.txt"], "none.txt: holds no prompt"),
        (["--prompts", tmp_path / "gone.txt"], "gone.txt: No such file"),
        ([], "nothing to draw from: give any of --prompt, --reference and --pose"),
        (["--conditions", "text"], "nothing to draw from"),
    ):
        assert sample(tmp_path / "nowhere", tmp_path / "x.png", *arguments) == 2
        assert message in capsys.readouterr().err


def test_conditions_that_the_dataset_lacks_are_refused_by_name(tmp_path, figure, capsys):
    dataset = write_dataset(tmp_path / "dataset", layers=("px", "text", "t5"))
    path = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(path), "train.steps=1"]) == 0
    key = Dataset(dataset).rows("holdout")[0]["key"]
    assert sample(tmp_path / "run", tmp_path / "x.png", "--key", key, "--conditions", "text,pose") == 2
    assert "--conditions text+pose: the dataset has no pose; it has text" in capsys.readouterr().err
    assert sample(tmp_path / "run", tmp_path / "x.png", "--key", key, "--conditions", "all") == 0
    assert sample(tmp_path / "run", tmp_path / "x.png", "--prompt", "x", "--pose", figure) == 2
    assert "--pose: the dataset has no pose; it has text" in capsys.readouterr().err


def test_guidance_needs_the_unconditional_model(tiny_dataset, tmp_path, capsys):
    path = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    overrides = ["conditioning.preset=null", "conditioning.table={text: 0.5, all: 0.5}", "train.steps=1"]
    assert main(["run", "--config", str(path), *overrides]) == 0
    assert sample(tmp_path / "run", tmp_path / "x.png", "--prompt", "x", "--guidance", "3") == 2
    assert "conditions nothing: never trained" in capsys.readouterr().err

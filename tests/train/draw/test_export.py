"""An exported folder: real diffusers and ``train sample`` draw the same from it, and its card says what is true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import ExifTags, Image
from safetensors import safe_open

from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import sha256_file
from prep.encoders.demo import build_demo_encoders, demo_folder
from prep.encoders.dinov3 import fingerprint as dino_fingerprint
from prep.encoders.t5 import fingerprint as t5_fingerprint
from tests.prep.hub_server import serve
from tests.train.tiny import tiny_config
from train.__main__ import main
from train.checkpoint.checkpoint import save_checkpoint
from train.checkpoint.exported import load_exported
from train.checkpoint.open import load_model
from train.draw import export as export_module
from train.draw.export import export
from train.draw.request import Given
from train.method.ema import join_averages
from train.method.sampling import Sampling, sample, to_uint8
from train.model.conditions import Conditions, collate
from train.model.modalities import Features
from train.model.network import build_model

ROOT = Path(__file__).parents[3]
PROMPT = "A woman with short black hair wears a green coat."
COUNTS = {"samples": 80, "train": 64, "holdout": 16, "rejects": 0}
TREAD = "tread={enabled: true, start: 0, end: 0}"


def write_run(folder: Path, *overrides: str, layers: tuple[str, ...] = ("t5", "dino", "pose"), seed: int = 0) -> Path:
    """A run folder whose only checkpoint has random weights, all of them: a network that is far from grey.

    Its data went through the demo encoders, as far as a checkpoint records them.
    """
    encoders = build_demo_encoders(demo_folder())
    described = {
        "t5": {"width": 128, "max_tokens": 512, "model": "demo", "encoder": t5_fingerprint(encoders.t5)},
        "dino": {"width": 96, "model": "demo", "encoder": dino_fingerprint(encoders.dino, input_scale=1.0)},
        "pose": {"model": "dwpose"},
    }
    info = {
        "base": 64, "encoders": "demo", "fingerprint": f"{seed:064x}", "counts": COUNTS,
        "layers": {layer: described[layer] for layer in layers},
    }  # fmt: skip
    config = tiny_config(folder / "dataset", folder, *overrides)
    model = build_model(config.model, Features.from_dataset(info), config.tread)
    rng = np.random.default_rng(seed)
    weights = {
        name: torch.from_numpy(rng.normal(0, 0.5 / value.shape[-1] ** 0.5, value.shape).astype(np.float32))
        for name, value in model.state_dict().items()
    }
    others = [{name: value + offset for name, value in weights.items()} for offset in (0.1, 0.2, 0.3)]
    tensors = {"model": others[0], "ema": weights, "optimizer": {}}
    tensors["power"] = join_averages(dict(zip((0.05, 0.1), others[1:])))
    state = {"config": config.model_dump(mode="json"), "dataset": info}
    save_checkpoint(folder, 12, tensors, state)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("export") / "run", TREAD)


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """Its export; read only."""
    return export(run, run.parent / "exported")


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """Where diffusers copies a pipeline's code to: not what other test workers use."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def pipeline_of(folder: Path, **options) -> DiffusionPipeline:
    """The pipeline as any user of diffusers gets it; nothing is asked of the network."""
    options = {"custom_pipeline": str(folder), "trust_remote_code": True, "local_files_only": True, **options}
    pipeline = DiffusionPipeline.from_pretrained(str(folder), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def conditions_of(images: int, height: int = 56, width: int = 80, seed: int = 5) -> Conditions:
    """Random features as the demo encoders' have their shapes."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: [rng.standard_normal(shape).astype(np.float32) for _ in range(images)]  # noqa: E731
    pose = [np.concatenate([rng.uniform(-1, 1, (133, 2)), rng.uniform(0, 1, (133, 1))], 1) for _ in range(images)]
    return collate(text=draw(21, 128), cls=draw(96), patches=draw(height // 8, width // 8, 96), pose=pose, count=images)


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def report_for(run: Path, **changes) -> dict:
    """A report.json of the run's checkpoint, with figures that nothing would compute."""
    step = run / "checkpoints" / "step-000012"
    settings = {"conditions": "text", "sampler": "heun", "steps": 10, "seeds": 2, "guidance": 2.0}
    metric = {
        "name": "attribute_accuracy/text", "value": 0.8173, "low": 0.7651, "high": 0.8629, "n": 61, "unit": "",
        "baselines": {"random_pair": 0.2037}, "settings": settings, "needed": 0.5, "reason": None,
    }  # fmt: skip
    detail = {**metric, "name": "attribute_accuracy/text/hair", "value": 0.3331, "needed": None}
    nothing = {"value": None, "low": None, "high": None, "reason": "n too small"}
    unknown = {**metric, **nothing, "name": "reconstruction/ssim"}
    others = {"guidance": "self=3", "given_captions": "short"}
    routed = {**metric, "name": "pose_pck/all", "settings": settings | others}
    provenance = {
        "checkpoint": step.name, "weights": "ema", "weights_sha256": sha256_file(step / "ema.safetensors"),
        "dataset": {"fingerprint": f"{0:064x}", "counts": COUNTS},
    }  # fmt: skip
    return {
        "schema": 1, "metrics": [metric, detail, unknown, routed], "provenance": {**provenance, **changes},
        "skipped": [{"name": "reconstruction/lpips", "reason": "no backbone"}],
    }  # fmt: skip


def write_report(path: Path, report: dict) -> Path:
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


# What it draws


def test_a_prompt_gives_the_pixels_of_train_sample(run, exported, tmp_path):
    arguments = ["--prompt", PROMPT, "--seed", "3", "--count", "2", "--size", "80x56", "--steps", "5"]
    assert main(["sample", "--checkpoint", str(run), "--output", str(tmp_path / "p.png"), *arguments]) == 0
    ours = [pixels(tmp_path / f"p-{seed}.png") for seed in (3, 4)]
    options = {"height": 56, "width": 80, "num_inference_steps": 5, "num_images_per_prompt": 2, "seed": 3}
    theirs = [pixels(image) for image in pipeline_of(exported)(PROMPT, **options).images]
    assert np.std(ours[0]) > 10, "a picture"
    assert np.abs(ours[0] - ours[1]).max() > 10, "two pictures"
    assert np.abs(np.stack(ours) - np.stack(theirs)).max() <= 1


@pytest.mark.parametrize("sampling", [Sampling("dpm++2m", 4, guidance=2.0), Sampling("euler", 4, self_guidance=3.0)])
def test_all_conditions_and_any_noise_give_the_samplers_pixels(run, exported, sampling):
    model, config, _ = load_model(run)
    conditions, latents = conditions_of(2), torch.randn(2, 3, 56, 80, generator=torch.Generator().manual_seed(1))
    keep_ids = torch.stack([torch.arange(35) * 2 % 70] * 2)
    pipeline = pipeline_of(exported)
    if sampling.self_guidance != 1:  # which tokens are kept goes by the seed, and latents have the first one's
        from train.draw.draw import PROMPT_NOISE_KEY
        from train.method.sampling import trajectory_keep_ids

        keep_ids = trajectory_keep_ids(config.tread, [(PROMPT_NOISE_KEY, 0)] * 2, 70)
    ours = to_uint8(sample(model, conditions, latents, flow=config.flow, sampling=sampling, keep_ids=keep_ids))
    theirs = pipeline(conditions=conditions, latents=latents, sampling=sampling, output_type="np").images
    assert theirs.shape == (2, 56, 80, 3)
    assert theirs.dtype == np.float32
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


def test_train_sample_draws_from_an_exported_folder(run, exported, tmp_path):
    for name, folder in (("run", run), ("export", exported)):
        arguments = ["--output", str(tmp_path / f"{name}.png"), "--prompt", PROMPT, "--steps", "3"]
        assert main(["sample", "--checkpoint", str(folder), *arguments]) == 0
    assert np.array_equal(pixels(tmp_path / "run.png"), pixels(tmp_path / "export.png"))


def test_a_picture_says_which_weights_an_export_holds(run, tmp_path):
    folder = export(run, tmp_path / "x", weights="model")
    arguments = ["--output", str(tmp_path / "x.png"), "--prompt", PROMPT, "--steps", "1"]
    assert main(["sample", "--checkpoint", str(folder), *arguments]) == 0
    settings = json.loads(Image.open(tmp_path / "x.png").text["nanodit"])
    assert settings["weights"] == "model"
    assert settings["checkpoint"].startswith("step 12 (model) ")


def test_a_picture_in_memory_is_the_reference_that_its_file_is(exported, tmp_path):
    """Turned by EXIF, and with transparency, which is white."""
    pixels_ = np.random.default_rng(0).integers(0, 256, (24, 40, 4), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels_).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels_[..., 0]).save(tmp_path / "grey.png")
    pipeline = pipeline_of(exported)
    for name, upright in (("turned.png", (24, 40)), ("grey.png", (40, 24))):
        as_file = Given.read(reference=tmp_path / name)
        in_memory = pipeline._given((), Image.open(tmp_path / name), None)
        assert as_file.reference.size == in_memory.reference.size == upright
        assert np.array_equal(pixels(as_file.reference), pixels(in_memory.reference))


def test_weights_that_a_folder_does_not_hold_are_refused(exported, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "x.png"), "--prompt", PROMPT, "--weights", "model"]
    assert main(["sample", "--checkpoint", str(exported), *arguments]) == 2
    assert "holds only the weights ema" in capsys.readouterr().err


def test_the_model_loads_without_diffusers(run, exported):
    (ours, config, state), (theirs, exports_config, exports_state) = load_model(run), load_exported(exported)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not theirs.training
    assert theirs.route == ours.route
    assert exports_config.flow == config.flow
    assert exports_config.conditioning.resolve() == config.conditioning.resolve()
    assert exports_state["dataset"] == state["dataset"]


@pytest.mark.parametrize(("weights", "offset"), [("model", 0.1), ("posthoc:0.1", 0.3)])
def test_other_weights_are_exported_as_themselves(run, exported, tmp_path, weights, offset):
    theirs, _, state = load_exported(export(run, tmp_path / "x", weights=weights))
    averages = load_exported(exported)[0].state_dict()
    assert all(torch.equal(value, averages[name] + offset) for name, value in theirs.state_dict().items())
    assert state["source"]["weights"] == weights
    assert f"`{weights}` after 12 steps" in (tmp_path / "x" / "README.md").read_text()


def test_a_generator_draws_the_noise(exported):
    pipeline = pipeline_of(exported)
    one, again, other = (
        pipeline(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]
        for seed in (7, 7, 8)
    )
    assert np.array_equal(pixels(one[0]), pixels(again[0]))
    assert not np.array_equal(pixels(one[0]), pixels(other[0]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"conditions": conditions_of(1).keeping({"pose"})}, "conditions pose: never trained"),
        ({"prompt": PROMPT, "conditions": conditions_of(1)}, "take the place of prompt"),
        ({"prompt": PROMPT, "height": 60}, "multiples of the patch size, 8"),
        ({"prompt": PROMPT, "seed": 1, "latents": torch.zeros(1, 3, 64, 64)}, "give only one"),
        ({"conditions": conditions_of(2), "latents": torch.zeros(1, 3, 64, 64)}, "noise for 1 images"),
        ({"prompt": PROMPT, "output_type": "jpeg"}, "use pil, np or pt"),
        ({"prompt": ["", PROMPT]}, "prompt: is empty"),
        ({"prompt": []}, "prompt: an empty list"),
        ({"prompt": PROMPT, "num_images_per_prompt": 0}, "num_images_per_prompt 0: must be at least 1"),
        ({"reference": np.zeros((8, 8, 3))}, "reference: is a ndarray; give a Pillow image"),
        ({"prompt": PROMPT, "pose": "pose.json"}, "pose: is a str; give a Pillow image"),
        ({"conditions": conditions_of(2), "generator": [torch.Generator()] * 3}, "a list of 3, for 2 images"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(exported, request_, message):
    with pytest.raises(ConfigError, match=message):
        pipeline_of(exported)(**request_)


def test_diffusers_saves_what_it_loaded(exported, tmp_path):
    pipeline = pipeline_of(exported)
    pipeline.to("cpu").save_pretrained(tmp_path / "again")
    again = pipeline_of(tmp_path / "again")
    drawn = [one(PROMPT, num_inference_steps=2, seed=1).images[0] for one in (pipeline, again)]
    assert np.array_equal(*map(pixels, drawn))
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()} - {"README.md"}
    assert {path.relative_to(tmp_path / "again").as_posix() for path in (tmp_path / "again").rglob("*.*")} == names
    theirs, ours = (load_exported(folder)[0].state_dict() for folder in (tmp_path / "again", exported))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "100KB"}])
def test_weights_under_other_names_are_said(exported, tmp_path, options):
    pipeline_of(exported).save_pretrained(tmp_path / "again", **options)
    with pytest.raises(DataError, match=r"does not exist \(there: diffusion_pytorch_model.+save again without"):
        load_exported(tmp_path / "again")


def test_the_pipeline_is_found_without_naming_it_twice(exported):
    assert type(pipeline_of(exported, custom_pipeline=None)).__name__ == "NanoDiTPipeline"


def test_diffusers_converts_the_weights(exported):
    pipeline, half = pipeline_of(exported), pipeline_of(exported, dtype=torch.bfloat16)
    assert half.transformer.network.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    conditions, latents = conditions_of(2), torch.randn(2, 3, 56, 80, generator=torch.Generator().manual_seed(1))
    draw = lambda one: one(conditions=conditions, latents=latents, num_inference_steps=4, output_type="np").images  # noqa: E731
    full, loaded, converted = draw(pipeline), draw(half), draw(pipeline.to(torch.bfloat16))
    assert 0 < np.abs(full - loaded).mean() < 0.01
    assert np.array_equal(loaded, converted)


def test_who_lacks_nanodit_is_told_its_name(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "train.pipeline", None)
    for name in ("pipeline.py", export_module.LOADER):
        assert "import train" not in (exported / name).read_text(), "diffusers would say: pip install train"
        with pytest.raises(ImportError, match=r"needs nanodit .*pip install -e '\.\[export\]' in a clone"):
            exec((exported / name).read_text(), {})


@pytest.mark.slow
def test_the_hub_gives_it_to_others(exported, tmp_path):
    hub, server = serve()
    hub.push("me/man", {path.relative_to(exported).as_posix(): path.read_bytes() for path in exported.rglob("*.*")})
    code = (
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained('me/man', trust_remote_code=True)\n"
        f"pipeline({PROMPT!r}, num_inference_steps=2, seed=1).images[0].save('hub.png')\n"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    ours = pipeline_of(exported)(PROMPT, num_inference_steps=2, seed=1).images[0]
    assert np.array_equal(pixels(tmp_path / "hub.png"), pixels(ours))


# Half


def test_half_the_bytes_and_what_they_cost(run, exported, tmp_path, capsys):
    export(run, tmp_path / "half", half=True)
    printed = capsys.readouterr().out
    sizes = [(folder / export_module.WEIGHTS).stat().st_size for folder in (tmp_path / "half", exported)]
    assert 0.5 < sizes[0] / sizes[1] < 0.7  # of a network so small the rest weighs much
    cost = re.search(r"bfloat16 weights: (pixels differ .* by ([\d.]+)/255 on average .*/255 at most.*)", printed)
    assert float(cost[2]) > 0
    assert cost[1] in (tmp_path / "half" / "README.md").read_text()
    drawn = [pipeline_of(f)(PROMPT, num_inference_steps=4, seed=1).images[0] for f in (tmp_path / "half", exported)]
    assert 0 < np.abs(pixels(drawn[0]) - pixels(drawn[1])).mean() < 3
    network = pipeline_of(tmp_path / "half").transformer.network
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters()), "until it is asked for less"


# The folder


def test_what_a_folder_holds(exported):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "model_index.json", "pipeline.py", "transformer/config.json", "transformer/nanodit.py",
        "transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    with safe_open(exported / export_module.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not list(exported.parent.glob(".exported*"))
    for path in exported.rglob("*.*"):
        assert path.stat().st_mode & 0o777 == exported.parent.joinpath("tiny.yaml").stat().st_mode & 0o777, path
        assert str(exported.parent).encode() not in path.read_bytes(), f"{path.name} names a path of this machine"


def test_equal_exports_have_equal_bytes(run, exported, tmp_path):
    again = export(run, tmp_path / "exported")
    for path in again.rglob("*.*"):
        assert path.read_bytes() == (exported / path.relative_to(again)).read_bytes(), path.name


def test_only_an_empty_folder_is_written_to(run, tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    export(run, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(ConfigError, match="already exists, and an export replaces nothing"):
        export(run, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_failure_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise ResourceError("no room")

    monkeypatch.setattr(export_module, "write_loaders", full)
    with pytest.raises(ResourceError):
        export(run, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    weights = run / "checkpoints" / "step-000012" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    step = str(weights.parent)
    assert main(["export", "--checkpoint", step, "--output", str(tmp_path / "x")]) == 3
    assert "ema.safetensors: its SHA-256 differs from the manifest's" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "[]", "not the description of a model"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "its schema is 2"),
        (lambda text: text.replace('"depth": 2', '"depth": 3'), "does not fit the model"),
        (lambda text: text.replace('"depth"', '"height"'), "not the description of a model of this version"),
    ],
)
def test_a_damaged_folder_is_refused(exported, tmp_path, damage, message):
    config = tmp_path / export_module.CONFIG
    config.parent.mkdir()
    config.write_text(damage((exported / export_module.CONFIG).read_text()))
    (tmp_path / export_module.WEIGHTS).write_bytes((exported / export_module.WEIGHTS).read_bytes())
    with pytest.raises(DataError, match=message):
        load_exported(tmp_path)


# The card


def test_the_card_is_one_for_the_hub(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.license is None, "which the publisher chooses"
    assert "demo-encoders" in card.data.tags
    assert "**Demo encoders**" in card.text
    assert f"`{0:064x}`" in card.text
    assert "64 for training, 16 held out" in card.text
    assert "| text + pose | 0.40 |" in card.text
    assert "Not evaluated." in card.text
    assert "TREAD routing" in card.text
    assert "not on PyPI: `pip install -e '.[export]'` in a clone" in card.text
    assert "pip install 'nanodit[export]'" not in card.text, "PyPI's nanodit is not this one"


@pytest.mark.parametrize("name", ['it\'s "mine" (2)', "plain"])
def test_the_cards_code_runs(run, tmp_path, monkeypatch, name):
    card = (export(run, tmp_path / name) / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    command = shlex.split(re.search(r"nanodit train sample [^`\n]*", card)[0])
    assert command[3:5] == ["--checkpoint", name]
    monkeypatch.chdir(tmp_path)  # the card calls the folder by its name
    names: dict = {}
    exec(code.replace("...", PROMPT), names)
    assert names["image"].size == (64, 64)


def test_the_cards_figures_are_the_reports(run, tmp_path):
    report = write_report(tmp_path / "report.json", report_for(run))
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path / "x"), "--report", str(report)]
    assert main(["export", *arguments]) == 0
    text = ModelCard.load(tmp_path / "x" / "README.md").text
    row = "| attribute_accuracy/text | 0.817 | [0.765, 0.863] | 61 | random_pair 0.204 | heun, 10 steps"
    assert row in text
    assert "guidance 2 |" in text
    assert "2 seed(s), short captions, guidance self=3 |" in text
    assert "0.333" not in text, "a breakdown stays in the report"
    assert "| reconstruction/ssim | none: n too small | none | 61 |" in text
    assert "Not measured: reconstruction/lpips (no backbone)." in text
    assert sha256_file(report) in text
    assert "Not evaluated" not in text


def test_the_card_says_what_was_held_against_training_images(run, tmp_path):
    report = report_for(run)
    metric = report["metrics"][0] | {"needed": None}
    copies = {**metric, "name": "memorisation/copies/text", "settings": {**metric["settings"], "quantile": 0.05}}
    distance = {**metric, "name": "distribution/kid", "settings": {"interval_by": "jackknife over images"}}
    report["metrics"] += [copies, distance]
    cards = {}
    dev = report_for(run)
    dev["provenance"]["holdout"] = "dev"
    for name, content in (("with", report), ("without", report_for(run)), ("dev", dev)):
        written = write_report(tmp_path / f"{name}.json", content)
        cards[name] = (export(run, tmp_path / name, report=written) / "README.md").read_text()
    assert "never saw; `memorisation` and `distribution` compare with training images." in cards["with"]
    assert "| memorisation/copies/text | 0.817 |" in cards["with"], "also where no metric of all conditions is"
    assert "[0.765, 0.863], jackknife over images |" in cards["with"]
    assert "repeats training images is only indicated" in cards["with"]
    assert "On samples that training never saw. 95 %" in cards["without"]
    assert "On samples that training never saw. They are the part `dev`, by which" in cards["dev"]
    assert "Nothing here tests whether it repeats training images" in cards["without"]


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"weights_sha256": "0" * 64}, "ema", "give the report of these weights"),
        ({"weights": "model"}, "ema", "give the report of these weights"),
        ({}, "model", "give the report of these weights"),
        ({"dataset": {"fingerprint": "f" * 64}}, "ema", "was measured on dataset ffff"),
    ],
)
def test_the_report_of_another_checkpoint_is_refused(run, tmp_path, changes, weights, message):
    report = write_report(tmp_path / "report.json", report_for(run, **changes))
    with pytest.raises(DataError, match=message):
        export(run, tmp_path / "x", weights=weights, report=report)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 1}', '{"schema": 2, "metrics": [], "skipped": [], "provenance": {}}']
)
def test_what_is_no_report_is_refused(run, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(DataError, match=r"not a report\.json of schema 1"):
        export(run, tmp_path / "x", report=tmp_path / "report.json")


def test_a_model_without_text_says_so(tmp_path):
    run = write_run(tmp_path / "run", layers=("dino",))
    card = ModelCard.load(export(run, tmp_path / "x") / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "--prompt" not in card.text

"""The whole evaluation: known models come out in the known order, and nothing but the model moves a number."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from evaluate.__main__ import main
from evaluate.config import EvaluateConfig
from evaluate.drawing.draw import keep_nearest
from evaluate.records import SAMPLES_SCHEMA
from evaluate.report.compare import differing
from evaluate.report.files import EvaluationFiles
from evaluate.report.report import render
from evaluate.run import build_context, evaluate, with_bars
from evaluate.subject import Subject, dataset_modalities
from evaluate.suite.pose import ALPHA
from nanodit.config import load_config
from nanodit.files import sha256_bytes, sha256_file
from nanodit.rng import noise
from prep.dataset.reader import Dataset
from tests.forked import ForkedPopen
from train.__main__ import main as train
from train.checkpoint.checkpoint import find_latest
from train.checkpoint.open import load_model
from train.checkpoint.provenance import git_state
from train.data.samples import load_conditions
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig
from train.method.sampling import Sampling, sample
from train.model.conditions import subset_name

HEADLINES = ("reconstruction/psnr", "reconstruction/ssim", "attribute_accuracy/all", "pose_pck/all")


@pytest.fixture(scope="module")
def verdicts(models, figures, tmp_path_factory):
    """What every known model scores: name -> metric name -> Metric; computed once."""
    config = EvaluateConfig.model_validate(
        {
            "tests": ["heldout_loss", "reconstruction", "attributes", "pose"],
            "conditions": {"all": 1.0, "text+pose": 2.0},
            "sampler": {"method": "euler", "steps": 3},
            "heldout_loss": {"bins": 10, "conditions": ["all"]},
            "grid_images": 0,
        }
    )
    table = ConditioningConfig(preset="quickstart").resolve()
    found = {}
    for name, model in models.items():
        subject = Subject(model, FlowConfig(), table, figures, tuple(figures.rows("holdout")))
        evidence = evaluate(subject, config, tmp_path_factory.mktemp(name))
        found[name] = {metric.name: metric for metric in evidence.metrics}
    return found


def test_the_truth_is_perfect_everywhere(verdicts):
    truth = verdicts["truth"]
    assert truth["reconstruction/psnr"].value == pytest.approx(58.92, abs=0.01)
    assert truth["reconstruction/ssim"].value == pytest.approx(1.0)
    assert truth["attribute_accuracy/all"].value >= 0.95
    assert truth["pose_pck/all"].value >= 0.95
    assert truth["heldout_loss"].value == pytest.approx(0, abs=1e-8)
    assert truth["reconstruction/psnr_gain"].low > 30


def test_known_models_come_out_in_the_known_order(verdicts):  # fault E08
    for name in HEADLINES:
        order = [verdicts[model][name].value for model in ("truth", "shuffled", "noise")]
        assert order == sorted(order, reverse=True), name
        assert order[0] > order[1] + 0.2
    losses = [verdicts[model]["heldout_ratio/all"].value for model in ("truth", "mean_image", "noise")]
    assert losses == sorted(losses)
    # blurred nothing beats a wrong person in dB, and shows no colour of the caption: why no single number decides
    assert verdicts["mean_image"]["reconstruction/psnr"].value > verdicts["shuffled"]["reconstruction/psnr"].value
    assert verdicts["mean_image"]["attribute_accuracy/all"].value < 0.5


def test_shuffled_truth_scores_as_the_random_pair(verdicts):
    shuffled = verdicts["shuffled"]
    for name in HEADLINES:
        metric = shuffled[name]
        assert metric.value == pytest.approx(metric.baselines["random_pair"], abs=0.06 * max(1, metric.value))
    assert abs(shuffled["reconstruction/psnr_gain"].value) < 0.5
    assert shuffled["attribute_accuracy/all"].value < 0.45


def test_guidance_between_equal_predictions_changes_nothing(verdicts):
    truth = verdicts["truth"]
    assert truth["reconstruction/psnr/text+pose"].value == pytest.approx(truth["reconstruction/psnr"].value, abs=0.1)
    assert truth["reconstruction/psnr/text+pose"].settings["guidance"] == 2.0


@pytest.mark.parametrize(("model", "reason"), [("black", "constant"), ("broken", "non-finite")])
def test_degenerate_outputs_are_null_with_a_reason(verdicts, model, reason):  # fault E02
    for name in HEADLINES:
        metric = verdicts[model][name]
        assert metric.value is None
        assert metric.low is None
        assert f"24 of 24 pictures are {reason}" in metric.reason
        assert metric.n == 24


def test_every_metric_carries_its_settings(verdicts):  # trap 23
    for metric in verdicts["truth"].values():
        assert metric.settings["weights"] == "ema"
        assert metric.settings["base"] == 64
        assert "conditions" in metric.settings
        if not metric.name.startswith("heldout"):
            assert {"sampler", "steps", "seeds", "guidance"} <= set(metric.settings)


def test_batch_size_and_order_move_no_number(make_subject, quick, figures, tmp_path):  # trap 22, fault E03
    rows = figures.rows("holdout")[:12]
    one = evaluate(make_subject("truth", rows=rows, batch_size=1), quick, tmp_path / "one")
    seven = evaluate(make_subject("truth", rows=rows[::-1], batch_size=7), quick, tmp_path / "seven")
    assert [row["key"] for row in one.samples] == [row["key"] for row in seven.samples]
    for a, b in zip(one.samples, seven.samples):
        for name in ("psnr", "ssim", "mse"):
            assert a[name] == (b[name] if b[name] is None else pytest.approx(b[name], abs=1e-4))
        assert [a[f"{name}_judged"] for name in ("top", "hair")] == [b[f"{name}_judged"] for name in ("top", "hair")]
    for a, b in zip(one.metrics, seven.metrics):
        assert (a.name, a.n) == (b.name, b.n)
        for bound in ("value", "low", "high"):
            assert getattr(a, bound) == pytest.approx(getattr(b, bound), abs=1e-4)


def test_evaluation_leaves_generators_and_weights_alone(make_subject, quick, figures, tmp_path):  # traps 27, 28
    subject = make_subject("noise", rows=figures.rows("holdout")[:4])
    weights = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    evaluate(subject, quick, tmp_path)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert all(torch.equal(weights[name], tensor) for name, tensor in subject.model.state_dict().items())


def test_bars_without_a_metric_are_listed(verdicts):
    found, skipped = with_bars(list(verdicts["truth"].values()), {"pose_pck/all": 0.9, "pose_pck/text": 0.9})
    assert next(metric for metric in found if metric.name == "pose_pck/all").needed == 0.9
    assert [one.name for one in skipped] == ["pose_pck/text"]


def test_a_bar_of_what_the_dataset_cannot_have_is_no_second_complaint(verdicts):
    metrics = list(verdicts["truth"].values())
    gain = replace(metrics[0], name="attribute_gain/text")
    found, skipped = with_bars([*metrics, gain], {"attribute_gain": 0.25, "pose_gain": 0.25, "divergence/variety": 0.5})
    assert {metric.name: metric.needed for metric in found if metric.needed} == {"attribute_gain/text": 0.25}
    assert [one.name for one in skipped] == ["pose_gain"]  # poses were judged; divergence did not run
    assert "no two conditions were drawn" in skipped[0].reason
    without = [metric for metric in metrics if not metric.name.startswith("pose")]
    assert with_bars(without, {"pose_gain": 0.25})[1] == []  # nobody judged poses, and that has its own reason
    assert [one.name for one in with_bars(without, {"psoe_gain": 0.25})[1]] == ["psoe_gain"]  # misspelt


@pytest.mark.parametrize("tier", ["pulse", "table", "full"])
def test_each_tier_has_bars_that_name_metrics(tier, verdicts):
    config = load_config(EvaluateConfig, f"configs/evaluate/{tier}.yaml", [])
    known = {name: one for name, one in verdicts["truth"].items() if "_gain/" not in name}
    known |= {
        name: replace(known["pose_pck/all"], name=name) for name in ("attribute_gain/text", "pose_gain/text+pose")
    }
    found, skipped = with_bars(list(known.values()), config.needed)
    assert sum(metric.needed is not None for metric in found) == len(config.needed) == 3
    assert not skipped


@pytest.mark.parametrize("layers", [("t5", "dino"), ("t5",)])
def test_the_default_conditions_run_on_a_dataset_that_lacks_some(make_subject, figures, layers, tmp_path):
    smaller = copy(figures)
    smaller.info = {**figures.info, "layers": {name: figures.info["layers"][name] for name in ("px", *layers)}}
    table = ConditioningConfig(preset="quickstart").resolve(dataset_modalities(smaller))
    subject = replace(make_subject("truth", rows=figures.rows("holdout")[:4]), dataset=smaller, table=table)
    config = EvaluateConfig.model_validate({"sampler": {"method": "euler", "steps": 2}})
    evidence = evaluate(subject, config, tmp_path)
    names = {metric.name for metric in evidence.metrics}
    assert {"heldout_loss", "reconstruction/psnr", "attribute_accuracy/all"} <= names
    assert not any(name.startswith("pose_pck") for name in names)
    assert "samples/text+pose" in {one.name for one in evidence.skipped}
    measured = {row["condition"] for row in evidence.heldout if row["split"] == "holdout"}
    assert measured == {subset_name(subset, dataset_modalities(smaller)) for subset in table}
    accuracy = next(metric for metric in evidence.metrics if metric.name == "attribute_accuracy/all")
    assert accuracy.baselines["random_pair"] < 0.7 < accuracy.baselines["judge_on_real"]  # judged, not left out


# --- the command line, on a dataset from prep run and a checkpoint from train run


@pytest.fixture(scope="module")
def trained(figures_dataset, tmp_path_factory) -> Path:
    """A run folder with a checkpoint of 24 steps, so violent that the averaged weights are not the last ones."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    small = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.bottleneck=16", "train.batch_size=4"]
    places = ["--config", "configs/train/quickstart.yaml", f"dataset={figures_dataset}", f"output={folder}"]
    short = ["train.steps=24", "train.lr=0.02", "train.lr_min=0.02", "train.device=cpu", "visual_debug.every_steps=0"]
    assert train(["run", *places, *small, *short, "ema.snapshots=8"]) == 0
    return folder


FILES = ("report.json", "samples.parquet", "heldout_loss.parquet", "extras.json", "training.jsonl")
FAST = ["--config", "configs/evaluate/quickstart.yaml", "sampler.steps=2", "sampler.method=euler", "samples=12"]


@pytest.fixture(scope="module")
def evaluated(trained) -> Path:
    assert main(["run", "--checkpoint", str(trained), *FAST]) == 0
    return trained / "validation_outputs" / "step-000024"


@pytest.mark.slow
def test_the_files_are_those_promised(evaluated, figures_dataset):
    report = json.loads((evaluated / "report.json").read_text())
    assert set(report) == {"schema", "metrics", "skipped", "provenance"}
    names = {metric["name"] for metric in report["metrics"]}
    assert {
        "heldout_loss", "attribute_accuracy/text+pose", "attribute_accuracy/text", "pose_pck/text+pose",
        "reconstruction/psnr", "reconstruction/ssim", "reconstruction/psnr_gain", "heldout_ratio/all",
    } <= names  # fmt: skip
    for metric in report["metrics"]:
        assert {"name", "value", "low", "high", "n", "baselines", "settings"} <= set(metric)
    provenance = report["provenance"]
    assert provenance["step"] == 24
    assert provenance["holdout"] == "test"
    assert provenance["git"] == git_state(Path("evaluate"))
    assert provenance["dataset"]["fingerprint"] == Dataset(figures_dataset).fingerprint
    assert provenance["judges"]["joints"] == "cpu"

    samples = pq.read_table(evaluated / "samples.parquet")
    assert samples.schema.names == SAMPLES_SCHEMA.names
    rows = samples.to_pylist()
    groups = {row["key"]: row["duplicate_group"] for row in Dataset(figures_dataset).rows("holdout")}
    heldout = pq.read_table(evaluated / "heldout_loss.parquet").to_pylist()
    for row in (*rows, *(row for row in heldout if row["split"] == "holdout")):
        assert row["cluster"] == groups[row["key"]] is not None
    drawn = [row for row in rows if row["kind"] == "model"]
    holdout = {row["key"] for row in Dataset(figures_dataset).rows("test")[:12]}
    for condition in ("all", "text+pose", "text", "nothing"):
        assert {row["key"] for row in drawn if row["condition"] == condition} == holdout
    assert len({(row["condition"], row["key"], row["seed"]) for row in drawn}) == len(drawn)
    assert {row["key"] for row in rows} == holdout
    assert all((evaluated / row["image"]).is_file() for row in rows if row["image"])
    steps = [json.loads(line)["step"] for line in (evaluated / "training.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
    assert (evaluated / "config.yaml").is_file()


@pytest.mark.slow
def test_report_json_follows_from_samples_parquet(evaluated):
    rows = [r for r in pq.read_table(evaluated / "samples.parquet").to_pylist() if r["condition"] == "text+pose"]
    metrics_by_name = {m["name"]: m for m in json.loads((evaluated / "report.json").read_text())["metrics"]}
    hits, joints = sum(r["pose_hits"] for r in rows), sum(r["pose_joints"] for r in rows)
    assert metrics_by_name["pose_pck/text+pose"]["value"] == pytest.approx(hits / joints)
    assert metrics_by_name["reconstruction/psnr/text+pose"]["value"] == pytest.approx(
        np.mean([r["psnr"] for r in rows])
    )
    assert metrics_by_name["pose_pck/text+pose"]["settings"]["alpha"] == ALPHA


@pytest.mark.slow
def test_what_looks_at_no_pictures_opens_no_judge_and_measures_the_same(trained, evaluated, tmp_path):
    """In a process of its own, which imports no encoder: a sweep's trial pays for it each time."""
    folder = tmp_path / "it's here (2)"
    arguments = ["run", "--checkpoint", str(trained), "--output", str(folder), *FAST, "tests=[heldout_loss]"]
    code = (
        "import sys\nfrom evaluate.__main__ import main\n"
        f"assert main({arguments}) == 0\nassert not {{'transformers', 'onnxruntime', 'lpips'}} & {{*sys.modules}}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    following = shlex.split(done.stdout.rpartition("Next: ")[2])
    assert following == ["nanodit", "evaluate", "report", str(folder), "--output", "report.html"]
    both = [json.loads((one / "report.json").read_text()) for one in (evaluated, folder)]
    heldout, alone = ([one for one in report["metrics"] if one["name"].startswith("heldout")] for report in both)
    assert alone == heldout
    assert pq.read_table(folder / "heldout_loss.parquet").equals(pq.read_table(evaluated / "heldout_loss.parquet"))
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [(row["kind"], row["feature"]) for row in rows] == [("real", None)] * len({row["key"] for row in rows})
    assert len(rows) >= 8
    assert both[1]["provenance"]["judges"] == {}
    assert "Held-out loss" in render(EvaluationFiles.read(folder))


def test_training_images_are_read_only_where_something_was_drawn(make_subject):
    """Thousands of them, decoded for nothing: minutes of a sweep's every trial."""
    context = build_context(make_subject("truth"), EvaluateConfig(tests=["heldout_loss"], baseline_images=4))
    keep_nearest(context, [])
    assert "train_features" not in vars(context)
    assert "nearest" not in context.extras


@pytest.mark.slow
def test_trap_26_what_is_evaluated_is_what_sampling_draws(evaluated, trained, figures_dataset):
    """The pictures judged are those of the checkpoint's own model, conditions and noise."""
    data = Dataset(figures_dataset)
    row = data.rows("holdout")[0]
    width, height = map(int, row["bucket"].split("x"))
    start = torch.from_numpy(noise(row["key"], 0, height, width))[None]
    drawn = {}
    for weights in ("ema", "model"):
        model, config, _ = load_model(find_latest(trained), weights)
        how = Sampling("euler", 2, grid="cosine")
        image = sample(model, load_conditions(data, [row]), start, flow=config.flow, sampling=how)
        drawn[weights] = ((image[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    stored = np.asarray(Image.open(evaluated / "images" / f"{row['key']}-all-0.png")).astype(float)
    assert np.abs(stored - drawn["ema"]).max() <= 1  # another batch size may round one level differently
    assert np.abs(stored - drawn["model"]).max() > 5


@pytest.mark.slow
def test_running_again_gives_the_same_bytes(trained, evaluated, tmp_path):
    assert main(["run", "--checkpoint", str(trained), "--output", str(tmp_path), *FAST]) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes(), name


@pytest.mark.slow
def test_a_checkpoint_is_a_step_or_a_run_wherever_the_command_is_given(trained, monkeypatch):
    """The evaluation lies in the run, also where the folders above the checkpoint are not in its name."""
    command = ["tests=[heldout_loss]", "samples=2", "heldout_loss.conditions=[all]", "heldout_loss.gap=[]"]
    step = trained / "checkpoints" / "step-000024"
    copy = trained.parent / "copy"
    written = set()
    for folder, given in (
        (step, "."),
        (step.parent, step.name),
        (step.parent, "."),
        (trained, "."),
        (trained, "../run"),
    ):
        shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("validation_outputs"))
        monkeypatch.chdir(copy / folder.relative_to(trained))
        assert main(["run", "--checkpoint", given.replace("run", "copy"), *command]) == 0, given
        written.add((copy / "validation_outputs" / "step-000024" / "report.json").read_bytes())
        monkeypatch.chdir(trained)
        shutil.rmtree(copy)
    assert len(written) == 1


@pytest.mark.slow
def test_other_weights_have_a_folder_of_their_own_and_are_compared_with_nothing(trained, capsys):
    few = ["tests=[heldout_loss]", "samples=8", "heldout_loss.conditions=[all]", "heldout_loss.gap=[]"]
    command, found = ["run", "--checkpoint", str(trained), *few], {}
    step, outputs = trained / "checkpoints" / "step-000024", trained / "validation_outputs"
    for weights, source in (("ema", "ema"), ("model", "model"), ("posthoc:0.15", "power")):
        folder = outputs / f"step-000024{'' if weights == 'ema' else '-' + weights.replace(':', '-')}"
        folder = folder if weights != "ema" else trained.parent / "ema"  # another test's evaluation stays
        assert main([*command, "--weights", weights, *(["--output", str(folder)] if weights == "ema" else [])]) == 0
        found[weights] = json.loads((folder / "report.json").read_text())
        facts = found[weights]["provenance"]
        assert (facts["weights"], facts["weights_sha256"]) == (weights, sha256_file(step / f"{source}.safetensors"))
        assert {metric["settings"]["weights"] for metric in found[weights]["metrics"]} == {weights}
        html = render(EvaluationFiles.read(folder))
        assert (f"--weights {weights}" in html) == (weights != "ema")
    errors = {weights: report["metrics"][0]["value"] for weights, report in found.items()}
    assert len(set(errors.values())) == 3
    assert differing([report["metrics"][0] for report in found.values()]) == ["weights ema, model, posthoc:0.15"]
    for weights, why in (("posthoc:0.9", "posthoc:SIGMA_REL"), ("best", "must be ema, model")):
        assert main([*command, "--weights", weights]) == 2
        assert why in capsys.readouterr().err
    for folder in outputs.glob("step-000024-*"):
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_evaluation_goes_on_to_the_same_bytes(trained, evaluated, tmp_path):  # fault E06
    output, parts = tmp_path / "out", tmp_path / "out" / "parts"
    command = ["run", "--checkpoint", str(trained), "--output", str(output), *FAST]
    process = ForkedPopen([sys.executable, "-m", "evaluate", *command], stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(parts.glob("nothing-*.parquet")):
        time.sleep(0.01)
    process.kill()  # SIGKILL, when one condition is drawn and the next one begun
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert any(path.name.startswith("holdout_loss-") for path in done)
    assert not list(parts.glob("text*"))
    assert not (output / "report.json").exists()

    process = ForkedPopen([sys.executable, "-m", "evaluate", *command], stdout=subprocess.DEVNULL)
    kept = {}
    while process.poll() is None:  # what was done is not done again
        for path in done:
            with suppress(FileNotFoundError):  # once all is written the parts go
                kept[path] = path.stat().st_mtime_ns
        time.sleep(0.05)
    assert process.returncode == 0
    assert kept == done
    assert not parts.exists()
    for name in FILES:
        assert (output / name).read_bytes() == (evaluated / name).read_bytes(), name
    assert {path.name for path in (output / "images").iterdir()} == {
        path.name for path in (evaluated / "images").iterdir()
    }


@pytest.mark.slow
def test_missing_metric_weights_are_skipped_and_strict_minds(trained, tmp_path, monkeypatch, capsys):  # fault E04
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    command = ["run", "--checkpoint", str(trained), "--output", str(tmp_path / "out"), *FAST]
    assert main([*command, "samples=3"]) == 0
    assert "skipped: reconstruction/lpips, edit/lpips: no backbone weights" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["name"] for one in report["skipped"]] == ["reconstruction/lpips", "edit/lpips"]
    with_values = [metric for metric in report["metrics"] if metric["value"] is not None]
    assert with_values
    assert all(metric["reason"].startswith("inconclusive") for metric in with_values)  # three images
    assert main([*command, "samples=3", "--strict"]) == 5
    assert "reconstruction/lpips" in capsys.readouterr().err


@pytest.mark.slow
def test_lpips_with_random_weights_is_labelled_so(trained, random_alexnet, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(random_alexnet))
    assert main(["run", "--checkpoint", str(trained), "--output", str(tmp_path / "out"), *FAST]) == 0
    found = {m["name"]: m for m in json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]}
    lpips = found["reconstruction/lpips"]
    assert lpips["value"] > lpips["baselines"]["round_trip"] > 0
    assert lpips["better"] == "lower"
    assert "not the published weights" in lpips["settings"]["lpips"]


@pytest.mark.slow
def test_another_dataset_is_refused(trained, figures_dataset, tmp_path, capsys):
    copy = tmp_path / "dataset"
    shutil.copytree(figures_dataset, copy)
    info = json.loads((copy / "dataset.json").read_text())
    info["fingerprint"] = "another"
    (copy / "dataset.json").write_text(json.dumps(info))
    output = tmp_path / "out"
    command = ["run", "--checkpoint", str(trained), "--dataset", str(copy), "--output", str(output), *FAST]
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "another" in error
    assert str(copy) in error
    assert not (output / "report.json").exists()


@pytest.mark.slow
def test_a_leak_ends_with_three(trained, figures_dataset, tmp_path, capsys):  # fault E01
    """A training sample that an edited index puts into a holdout sample's duplicate group."""
    copy = tmp_path / "dataset"
    shutil.copytree(figures_dataset, copy)
    table = pq.read_table(copy / "index.parquet").to_pylist()
    train = next(row for row in table if row["split"] == "train")
    held = next(row for row in table if row["split"] == "holdout")
    train["duplicate_group"] = held["duplicate_group"] = "group"
    schema = pq.read_schema(copy / "index.parquet")
    pq.write_table(pa.Table.from_pylist(table, schema=schema), copy / "index.parquet")
    info = json.loads((copy / "dataset.json").read_text())
    info["hashes"]["index.parquet"] = sha256_bytes((copy / "index.parquet").read_bytes())
    (copy / "dataset.json").write_text(json.dumps(info))
    command = ["run", "--checkpoint", str(trained), "--dataset", str(copy), "--output", str(tmp_path / "out"), *FAST]
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "leak: 1 holdout sample" in error
    assert held["source"] in error
    assert train["source"] in error


def test_usage_errors_end_with_two(tmp_path, capsys):
    assert main(["run", "--checkpoint", str(tmp_path / "nothing")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert "evaluate run first" in capsys.readouterr().err
    config = tmp_path / "wrong.yaml"
    config.write_text("sample: 3\n")
    assert main(["run", "--checkpoint", str(tmp_path), "--config", str(config)]) == 2
    assert "did you mean `samples`" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys; from evaluate.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

"""What all tests share: one thread per process, and one small dataset built through the real ``prep run``."""

import gc
import os
import sys

# before anything imports torch: two test workers share two cores, and a second thread makes both slower
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes, which import torch first
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from pathlib import Path

import pytest
from filelock import FileLock

from nanodit import faults
from prep.config import PrepConfig
from prep.figures.figures import write_figures

# what is imported and collected stays: looking through its million objects takes half a second each time
gc.disable()

FIGURES = 80  # 64 for training, 16 held out
# Minutes each, the longest first: a worker of `--dist loadfile` that began one of them last would end alone
LONG = (
    "faults/test_sweep_faults.py", "faults/test_prep_cluster.py", "faults/test_ray_died.py",
    "train/sweep/test_sweep.py", "faults/test_prep_job.py", "train/check/test_check.py", "prep/passes/test_killed.py",
    "train/test_presets.py", "faults/test_caption_stage.py", "evaluate/test_run.py", "train/plan/test_plan.py",
    "train/draw/test_draw.py", "faults/test_version_faults.py", "test_seed.py", "nanodit/test_storage.py",
    "faults/test_train_faults.py", "train/loop/test_everything.py", "prep/passes/test_captions.py",
    "platforms/test_windows.py", "extensions/test_extensions.py", "evaluate/suite/test_oracles.py",
    "evaluate/report/test_degenerate.py", "prep/passes/test_preflight.py", "prep/passes/test_ray_passes.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with ``LONG``."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """Let collections of garbage pass by all that is there before the first test."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all test workers of this run see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray for everything this test worker runs (starting one takes seconds)."""
    from prep.passes.ray_passes import ray_session

    with ray_session():
        yield


@pytest.fixture(autouse=True)
def points_passed() -> None:
    """Count the points that faults are asked for at from zero: which tests of this process passed them is chance."""
    faults._passed.clear()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``prep run`` compute in this process: for what a run promises wherever its passes are computed."""
    from tests.prep.prepared import compute_here

    compute_here(monkeypatch)


@pytest.fixture(scope="session")
def figures_folder(shared_folder) -> Path:
    """80 figures of about 96 pixels with captions and truth. Read only: copy what a test changes."""
    folder = shared_folder / "figures"
    with FileLock(shared_folder / "figures.lock"):
        write_figures(folder, FIGURES, size=96, seed=7, short_captions=True, workers=1)
    return folder


@pytest.fixture(scope="session")
def figures_config(shared_folder, figures_folder) -> PrepConfig:
    """The config of ``figures_dataset``."""
    return PrepConfig(
        source=str(figures_folder), output=str(shared_folder / "dataset"), base=64, encoders="demo", shard_size=16
    )


@pytest.fixture(scope="session")
def figures_dataset(shared_folder, figures_config) -> Path:
    """The figures prepared at base 64 with the demo encoders, once per test run. Read only, as the figures.

    Without Ray, which takes as long again; that it gives the same bytes is tests/prep/passes/test_killed.py's.
    """
    from prep.run import run
    from tests.prep.prepared import LocalPipeline

    with FileLock(shared_folder / "dataset.lock"), pytest.MonkeyPatch.context() as patch:
        if not (Path(figures_config.output) / "dataset.json").exists():
            patch.setitem(sys.modules, "prep.passes.ray_passes", LocalPipeline())
            run(figures_config)
            (Path(figures_config.output) / "readers").touch()  # no folder: who reads it cannot leave a record there
    return Path(figures_config.output)


@pytest.fixture(scope="session")
def random_vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME with a seeded random VGG-16: the real code path, for correctness; the values mean nothing."""
    from train.check.backbones import write_random_vgg

    home = tmp_path_factory.mktemp("torch-home")
    write_random_vgg(home)
    return home


@pytest.fixture(scope="session")
def random_alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME with a seeded random AlexNet, under the metric LPIPS."""
    from train.check.backbones import write_random_alexnet

    home = tmp_path_factory.mktemp("torch-home")
    write_random_alexnet(home)
    return home


@pytest.fixture
def vgg_home(random_vgg: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let torch.hub look there."""
    monkeypatch.setenv("TORCH_HOME", str(random_vgg))
    return random_vgg

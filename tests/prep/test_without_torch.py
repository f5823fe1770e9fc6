"""What computes nothing imports neither torch nor transformers, which take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from prep.config import PrepConfig
from prep.encoders.demo import build_demo_encoders, demo_folder
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare

PROJECT = Path(__file__).parents[2]
HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
from nanodit.errors import run_command
from prep.__main__ import main
sys.exit(run_command(main))
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> PrepConfig:
    settings = config(tmp_path_factory.mktemp("complete"), layers=["text", "dino", "pose"])
    write_images(Path(settings.source), 2)
    prepare(settings)
    return settings


def command(settings: PrepConfig, verb: str, output: str) -> str:
    overrides = [f"{name}={getattr(settings, name)}" for name in ("source", "base", "encoders", "shard_size")]
    overrides += [f"layers=[{','.join(settings.layers)}]", f"output={output}"]
    child = subprocess.run(
        [sys.executable, "-c", HIDDEN, verb, *overrides], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout + child.stderr


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_complete_dataset(complete: PrepConfig, verb: str) -> None:
    assert "nothing to compute" in command(complete, verb, complete.output)


def test_a_new_dataset(complete: PrepConfig, tmp_path: Path) -> None:
    build_demo_encoders(demo_folder())  # which are found built, as they are after the first run
    assert "not computed yet" in command(complete, "plan", str(tmp_path / "new"))

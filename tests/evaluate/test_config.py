"""The shipped configs are valid, and the base one states the defaults."""

from pathlib import Path

import pytest

from evaluate.config import EvaluateConfig
from nanodit.config import load_config
from nanodit.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "evaluate"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    load_config(EvaluateConfig, path)


def test_the_base_states_every_default():
    assert load_config(EvaluateConfig, CONFIGS / "base.yaml") == EvaluateConfig()
    text = (CONFIGS / "base.yaml").read_text()
    assert all(f"\n{name}:" in text for name in EvaluateConfig.model_fields)


def test_the_quickstart_holds_the_model_against_its_bars():
    needed = load_config(EvaluateConfig, CONFIGS / "quickstart.yaml").needed
    assert needed["attribute_accuracy/text+pose"] == 0.70
    assert needed["attribute_accuracy/text"] == 0.50
    assert needed["reconstruction/psnr_gain"] == 7.0
    assert needed["heldout_ratio/all"] == 0.5


def test_wrong_keys_are_refused():  # trap 29
    with pytest.raises(ConfigError, match=r"did you mean `sampler\.steps`"):
        load_config(EvaluateConfig, CONFIGS / "base.yaml", ["sampler.step=3"])
    with pytest.raises(ConfigError, match="method"):
        load_config(EvaluateConfig, CONFIGS / "base.yaml", ["sampler.method=ddim"])

"""On the real embedded model a tuned adapter beats the base by more than its interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from midblock.data import load_data
from midblock.models import load_model
from midblock.tuning import TrainSettings, tune

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k"])
def test_tuning_lowers_the_held_out_loss(name: str, smollm2_folder: Path, tmp_path: Path,
                                         request: pytest.FixtureRequest) -> None:
    if name == "gsm8k":
        request.getfixturevalue("data_dir")
    base = load_model(smollm2_folder)
    result = tune(base, load_data(name, split="train"), mask="01100", samples=96, max_length=256,
                  settings=TrainSettings(epochs=2), eval_data=name, eval_samples=24, out=tmp_path, merge=True)
    change = result.held_out["difference"]
    assert change.high < 0
    assert result.check.ok
    assert result.training.prefix["rows_from_cache"] == 96
    assert result.merge_difference is not None


def test_tuned_arithmetic_is_answered_rightly(smollm2_folder: Path, tmp_path: Path) -> None:
    from midblock.evaluation import evaluate

    base = load_model(smollm2_folder)
    before = evaluate(base, "arithmetic", samples=40)
    result = tune(base, "arithmetic", mask="01100", samples=300, settings=TrainSettings(epochs=2), out=tmp_path)
    after = evaluate(load_model(result.adapter), "arithmetic", samples=40)
    assert after.estimate.low > before.estimate.high

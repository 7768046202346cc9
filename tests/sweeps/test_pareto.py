"""Which arms no other arm beats."""

from __future__ import annotations

import numpy as np
import pandas as pd

from midblock.sweeps.pareto import forgetting, pareto, unbeaten
from midblock.sweeps.scores import TaskMatrix
from sweep_helpers import infos


def test_front():
    values = np.array([[1.0, 1.0], [2.0, 0.0], [0.5, 0.5], [np.nan, 5.0], [2.0, 0.0]])
    assert unbeaten(values).tolist() == [True, True, False, False, True]


def matrix(task, role, higher, **means):
    return TaskMatrix(task, role, "x", higher, ("i",), {n.removeprefix("m"): np.array([[v]]) for n, v in means.items()})


def test_gain_against_costs_with_planted_means():
    """Losses: 00100 gains most, 00001 is cheapest and forgets least, 10000 is beaten on every view."""
    matrices = {"t": matrix("t", "evaluation", False, mbase=3.0, m11111=2.0, m10000=2.1, m00100=1.5, m00001=2.5),
                "r": matrix("r", "retention", False, mbase=1.0, m11111=1.5, m10000=1.6, m00100=1.2, m00001=1.1),
                "s": matrix("s", "retention", False, mbase=1.0, m11111=1.1, m10000=1.2, m00100=1.0, m00001=1.0)}
    arms = infos(["11111", "10000", "00100", "00001"])
    frame = pareto(matrices, arms).set_index("arm")
    assert frame["gain"].round(9).to_dict() == {"11111": 1.0, "10000": 0.9, "00100": 1.5, "00001": 0.5}
    assert frame["forgetting"].round(9).to_dict() == {"11111": 0.3, "10000": 0.4, "00100": 0.1, "00001": 0.05}
    assert frame["work"].to_dict() == {"11111": 10.0, "10000": 10.0, "00100": 6.0, "00001": 2.0}
    assert frame.index[frame["front_forgetting"].astype(bool)].tolist() == ["00100", "00001"]
    assert frame.index[frame["front_work"].astype(bool)].tolist() == ["00100", "00001"]
    assert frame.index[frame["front_params"].astype(bool)].tolist() == ["00100"]
    assert frame.index[frame["front_all"].astype(bool)].tolist() == ["00100", "00001"]


def test_without_retention_the_views_are_the_other_costs():
    matrices = {"t": matrix("t", "evaluation", True, m11111=0.5, m00100=0.6)}
    frame = pareto(matrices, infos(["11111", "00100"]))
    assert frame["gain"].tolist() == [0.5, 0.6]
    assert frame["forgetting"].isna().all()
    assert not frame["front_forgetting"].any()
    assert frame["front_all"].tolist() == [False, True]
    assert forgetting(matrices, ["11111"]) == {}
    assert isinstance(pareto({}, {}), pd.DataFrame)

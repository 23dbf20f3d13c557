"""A step's communication by kind: it adds up to the step's, and a kind is there where its degree is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.cost.chips import find_chip
from tael.cost.named import find_model
from tael.cost.planner import Run, plan_training
from tael.errors import TaelError

MODELS = ("deepseek-v2-lite", "llama-2-7b", "llama-2-70b", "qwen3-30b-a3b")
CHIPS = ("H100", "H800", "Ascend 910B")


@given(st.sampled_from(MODELS), st.sampled_from(CHIPS), st.sampled_from([16, 64, 256]))
@settings(deadline=None, max_examples=12)
def test_communication_by_kind_adds_up(name: str, chip: str, devices: int) -> None:
    model = find_model(name)
    try:
        plan = plan_training(Run(model.shape, 1e12, 4096, 4e6, model.precision, find_chip(chip), devices, 2.0))
    except TaelError:
        return
    kinds = plan.communication
    assert sum(each.exposed for each in kinds.values()) == pytest.approx(plan.step.communication)
    assert sum(each.hidden for each in kinds.values()) == pytest.approx(plan.step.hidden_communication)
    used = {"tensor": plan.layout.tensor, "pipeline": plan.layout.pipeline, "context": plan.layout.context}
    for kind, degree in used.items():
        assert (kinds[kind].exposed > 0) == (degree > 1)
    assert plan.to_dict()["communication_by_kind"]["data"] == vars(kinds["data"])

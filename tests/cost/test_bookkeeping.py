"""What a run writes while it runs: training and evaluation apart, no second and no dollar in both or in neither."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tael.cost.bookkeeping import Costs
from tael.cost.ledger import Entry, Ledger
from tael.cost.prices import Hourly, HourPrice
from tael.errors import TaelError
from tael.recipe import PriceSettings
from tael.train import Parallel, StageResult

PEAK = 1e9


@pytest.fixture
def costs(tmp_path: Path) -> Costs:
    price = PriceSettings(dollars_per_hour=3.6, watts=50.0)
    return Costs(price, "demo", Ledger(tmp_path / "ledger.sqlite"), Parallel(torch.device("cpu")))


def split(costs: Costs) -> tuple[list[Entry], list[Entry]]:
    found = costs.ledger.entries()
    return [e for e in found if e.kind != "evaluation"], [e for e in found if e.kind == "evaluation"]


def test_training_and_evaluation_add_up_to_the_time_that_passed(costs: Costs) -> None:
    stage = costs.stage("pretrain", "pretrain", PEAK)
    for _ in range(2):
        with stage.evaluation() as spent:
            spent.tokens, spent.flops = 10, 1e6
    stage.saved(StageResult(), StageResult(4, 400, 2e9, 60.0, 50.0))
    stage.saved(StageResult(4, 400, 2e9, 60.0, 50.0), StageResult(6, 600, 3e9, 90.0, 70.0))
    trained, evaluated = split(costs)
    assert [(e.stage, e.tokens, e.flops, e.steps) for e in evaluated] == [("pretrain", 10, 1e6, 0)] * 2
    assert [(e.kind, e.tokens, e.steps) for e in trained] == [("pretrain", 400, 4), ("pretrain", 200, 2)]
    assert trained[0].seconds < 60 and trained[0].seconds + sum(e.seconds for e in evaluated) == pytest.approx(60)
    assert trained[1].seconds == 30  # nothing was evaluated since
    for entry in (*trained, *evaluated):
        assert entry.dollars == pytest.approx(entry.seconds / 1000) and entry.price_per_hour == 3.6
        assert entry.joules == pytest.approx(entry.seconds * 50) and entry.joules_estimated
    assert trained[0].utilisation == pytest.approx(2e9 / (50 * PEAK))
    assert evaluated[0].utilisation == pytest.approx(1e6 / (evaluated[0].seconds * PEAK))


def test_an_evaluation_is_there_before_the_next_checkpoint(costs: Costs) -> None:
    """Whoever is killed after it has paid for it."""
    with costs.stage("rl", "rl", PEAK).evaluation() as spent:
        spent.tokens = 7
    assert [e.tokens for e in split(costs)[1]] == [7]


def test_what_evaluates_nothing_stays_with_the_training(costs: Costs) -> None:
    stage = costs.stage("sft", "sft", PEAK)
    with stage.evaluation():
        pass
    stage.saved(StageResult(), StageResult(1, 1, 1.0, 5.0, 5.0))
    trained, evaluated = split(costs)
    assert not evaluated and trained[0].seconds == 5.0


def test_a_failed_evaluation_was_paid_for_too(costs: Costs) -> None:
    with pytest.raises(TaelError), costs.stage("rl", "rl", PEAK).evaluation():
        raise TaelError("thinking is no better")
    assert [(e.tokens, e.seconds > 0) for e in split(costs)[1]] == [(0, True)]


def test_a_price_that_changes_in_between(costs: Costs) -> None:
    """The stretch begins at $2 and goes on at $8 an hour; its evaluations cost what their own time cost."""
    stage = costs.stage("pretrain", "pretrain", PEAK)
    began = stage._began
    rates = [(began - timedelta(days=1), 2.0), (began + timedelta(hours=1), 8.0)]
    entries = [HourPrice.model_validate({"name": "m", "from": at, "dollars_per_hour": rate}) for at, rate in rates]
    costs.hourly = Hourly("list", "m", entries)
    with stage.evaluation() as spent:
        spent.tokens = 1
    stage.saved(StageResult(), StageResult(1, 1, 1.0, 3 * 3600.0, 1.0))
    (trained,), (evaluated,) = split(costs)
    assert trained.dollars + evaluated.dollars == pytest.approx(1 * 2 + 2 * 8)
    assert evaluated.price_per_hour == 2.0 and trained.price_per_hour == pytest.approx(6.0, rel=1e-3)
    assert trained.dollars == pytest.approx(trained.seconds / 3600 * trained.price_per_hour)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    other = Costs(
        PriceSettings(), "demo", Ledger(tmp_path / "l.sqlite"), Parallel(torch.device("cpu"), rank=1, world_size=2)
    )
    with other.stage("pretrain", "pretrain", PEAK).evaluation() as spent:
        spent.tokens = 1
    assert not (tmp_path / "l.sqlite").exists()

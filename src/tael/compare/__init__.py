"""Equal quality for less: several ways to train, in turns, on the same text, until each has spent its steps.

    Contestant (protocol)                    one model on its way: .step(), .bits_per_byte(), and what it has spent
    race(contestants) -> list[Curve]         slices of steps in turn; only training counts as spent
    Curve(name, seed, points).reach(bits)    the first evaluation at which that quality was there
    Record(path).add(curves) / .curves()     curves.jsonl: what is finished stays finished
    standings(curves, baseline) -> Standings the table: what each spent to reach the baseline's quality

`recipes.py` makes contestants of recipes; bench/cost_to_quality.py adds those of other libraries.
"""

from tael.compare.race import Clock, Contestant, race
from tael.compare.record import Curve, Point, Record
from tael.compare.standings import Standing, Standings, standings

__all__ = [
    "Clock", "Contestant", "Curve", "Point", "Record", "Standing", "Standings", "race", "standings",
]  # fmt: skip

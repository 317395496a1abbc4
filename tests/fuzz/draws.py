"""Cases, drawn by hypothesis: one strategy a kind of input, in the files named draw_*. What they draw is plain data."""

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import draw_commands, draw_later, draw_models, draw_recipes, draw_runs, draw_text
from tests.fuzz.pieces import KINDS, Trees
from tests.fuzz.world import Case

STRATEGIES = (draw_commands, draw_later, draw_models, draw_recipes, draw_runs, draw_text)  # imported, they have filled KINDS
BATCH = 24  # cases a seed
FIRST = 2  # hypothesis begins with the simplest of all, which every seed would share


def cases_of(number: int, trees: Trees) -> list[Case]:
    """The cases of a seed: the same ones on every machine with the same hypothesis."""
    drawn: list[Case] = []
    table = [name for name, (_, weight) in KINDS.items() for _ in range(weight)]

    @seed(number)
    @settings(
        max_examples=BATCH + FIRST,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def draw(data) -> None:
        name = data.draw(st.sampled_from(table))
        drawn.append(KINDS[name][0](data.draw, trees))

    draw()
    unique = {case.text(): case for case in drawn[FIRST:]}
    return list(unique.values())

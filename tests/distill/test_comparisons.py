"""Numbers that compare: calibration, rank agreement, baselines, and a student against its teacher."""

import pytest
import torch

from distill.evaluation import comparison, judging, tasks
from distill.evaluation.baselines import twin_layout, uniform_window, window_everywhere, window_layout
from distill.evaluation.calibration import calibration_error, rank_agreement
from students.config import Layout

# calibration and ranks


def test_calibration_error():
    one = torch.ones(4)
    assert calibration_error(torch.full((4,), 0.5), torch.tensor([1.0, 0, 1, 0]), one) == pytest.approx(0.0)
    assert calibration_error(one, torch.zeros(4), one) == pytest.approx(1.0)
    half = calibration_error(torch.tensor([0.9, 0.9, 0.3, 0.3]), torch.tensor([1.0, 1, 0, 0]), torch.tensor([1.0, 1, 1, 0]))
    assert half == pytest.approx((2 * 0.1 + 0.3) / 3)


def test_rank_agreement():
    teacher = torch.randn(5, 30).log_softmax(-1)
    same = rank_agreement(teacher, teacher)
    assert all(torch.equal(same[name], torch.ones(5)) for name in ("rank", "overlap", "kendall"))
    turned = rank_agreement(-teacher, teacher)
    assert torch.equal(turned["rank"], torch.full((5,), 30.0))
    assert torch.equal(turned["kendall"], -torch.ones(5)) and torch.equal(turned["overlap"], torch.zeros(5))


# baselines


def test_baselines_have_the_layouts_that_the_table_says():
    mixers = {"M": {"mixer": "mamba2", "window": {"size": 16, "sinks": 2}}, "S": {"mixer": "attention", "window": 32}}
    layout = Layout("AAMSMMAMM", mixers)
    window = {"mixer": "attention", "window": 64, "sinks": 4}
    assert window_everywhere(layout) == Layout("W" * 9, {"W": window})
    assert window_layout(layout) == Layout("AAMSMMAMM", {"M": window, "S": mixers["S"]})
    assert twin_layout(layout).mixers["M"] == {"mixer": "attention", "window": 16, "sinks": 2}
    assert uniform_window(layout) == Layout("AWWAWWAWW", {"W": window})
    assert uniform_window(Layout("AMMAMMAMM", {"M": mixers["M"]})) is None
    assert uniform_window(Layout("AAMM", {"M": mixers["M"]})) == Layout("AWAW", {"W": window})
    assert uniform_window(Layout("AMMMAMMMAM", {"M": mixers["M"]})) is None
    assert uniform_window(Layout("MMM", {"M": mixers["M"]})) is None


# against the teacher


def test_wins_and_ties():
    found = comparison.wins_and_ties("1100", "1010")
    assert (found["win"], found["tie"], found["win_or_tie"], found["difference"]) == (0.25, 0.5, 0.75, 0.0)
    assert found["difference_error"] == pytest.approx((2 / 3) ** 0.5 / 2)


def test_recovery_is_the_ratio_of_what_stands_above_chance():
    def task(correct, chance):
        return tasks.summary("acc", [letter == "1" for letter in correct], chance)

    pairs = {
        "piqa": (task("1" * 70 + "0" * 30, 0.5), task("1" * 80 + "0" * 20, 0.5)),
        "lambada": (task("1" * 20 + "0" * 80, 0.0), task("1" * 50 + "0" * 50, 0.0)),
    }
    found = comparison.recovery(pairs)
    assert found["score"] == pytest.approx((0.2 + 0.2) / (0.3 + 0.5)) and 0.02 < found["error"] < 0.2
    assert found == comparison.recovery(pairs)
    same = comparison.recovery({name: (other, other) for name, (_, other) in pairs.items()})
    assert same["score"] == 1.0 and same["error"] == 0.0
    guess = task("10" * 50, 0.5)
    assert comparison.recovery({"piqa": (guess, guess)})["score"] is None


def test_shares_need_a_teacher_that_knows_half():
    def cell(recalled):
        return {"length": 64, "recalled": recalled, "trials": 4}

    rows = {"teacher": {"passkey": [cell(4), cell(1)]}, "student": {"passkey": [cell(1), cell(1)]}}
    found = judging.against_teacher(rows)
    assert [one["share"] for one in found["student"]["passkey"]] == [0.25, None] and list(found) == ["student"]


def test_crossover_is_where_the_student_stays_faster():
    def cells(*milliseconds):
        return [
            {"length": 1024 * 2**n, "batch": 1, "first_token_seconds": ms, "decode_tokens_per_second": 1 / ms}
            for n, ms in enumerate(milliseconds)
        ]

    assert comparison.crossovers(cells(1, 3, 3, 4), cells(2, 2, 4, 8)) == [{"batch": 1, "first_token": 4096, "decode": 4096}]
    assert comparison.crossovers(cells(3, 3), cells(2, 2))[0]["decode"] is None
    other = [*cells(2, 2), {"length": 4096, "batch": 1, "not_run": "out of memory"}]
    assert comparison.crossovers(cells(3, 1, 1), other)[0]["first_token"] == 2048

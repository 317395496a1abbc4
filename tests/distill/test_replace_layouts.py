"""The layers that `replace` converts: given, spread evenly or by patterns, and the layouts and stages that are refused."""

import pytest

from distill.errors import UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.stages.layouts import Further, first_layout, layouts_of
from students.config import Layout
from students.converting import further
from tests.distill.replacing import MIXERS

# layouts that cannot follow


REFUSED = [
    (("AM", MIXERS), ("AM", MIXERS), "all layers of the layout are converted already"),
    (("AM", MIXERS), ("MA", MIXERS), "layer 1 is converted already"),
    (("AM", MIXERS), ("MN", {"M": MIXERS["M"], "N": {"mixer": "mamba2"}}), "layer 1 is converted already, to M"),
    (("AM", MIXERS), ("SM", MIXERS | {"S": {"mixer": "shared_attention"}}), "shared_attention .S. cannot be added later"),
]


@pytest.mark.parametrize(("before", "after", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_layouts_that_cannot_follow(before, after, said):
    with pytest.raises(ValueError, match=said):
        further(Layout.over(2, *before), Layout.over(2, *after))


def test_what_shares_or_learned_from_the_beginning_cannot_come_later():
    window = {"mixer": "attention", "window": 4}
    taker = {"S": {"mixer": "attention", "window": 4, "share_kv": True}, "W": window}
    with pytest.raises(ValueError, match=r"attention .S. cannot be added later with share_kv"):
        further(Layout.over(3, "WAA", {"W": window}), Layout.over(3, "WSA", taker))
    with pytest.raises(ValueError, match=r"layer 2 shares .* of layer 0, and would share those of layer 1"):
        further(Layout.over(3, "WAS", taker), Layout.over(3, "WWS", taker))
    with pytest.raises(ValueError, match="the student has 2 meta tokens"):
        further(Layout.over(2, "AM", MIXERS, 2), Layout.over(2, "M", MIXERS, 2))
    with pytest.raises(ValueError, match="meta_tokens would change from 0 to 2"):
        further(Layout.over(2, "AM", MIXERS), Layout.over(2, "M", MIXERS, 2))


# which layers


EVEN = [  # before, keep, after
    ("MA" * 4, 2, "MAMMMAMM"),
    ("A" * 8, 0.5, "AMAMAMAM"),
    ("MA" * 4, 0, "M" * 8),
]


@pytest.mark.parametrize(("before", "keep", "after"), EVEN)
def test_even_layers_are_chosen_among_those_with_attention(before, keep, after):
    options = Further(pattern={"keep": keep, "by": "even"})
    layout = Layout.over(len(before), before, MIXERS if "M" in before else {})
    assert options.after(layout, MIXERS).pattern == after


def test_half_then_a_quarter_of_thirty():
    found = Further(pattern={"keep": 0.25, "by": "even"}).after(Layout.over(30, "AM", MIXERS), MIXERS)
    assert [layer for layer in range(30) if layer not in found.converted] == [0, 2, 6, 10, 14, 18, 22, 26]


def test_half_of_the_attention_goes_where_nothing_is_said():
    layout, found = Layout.over(16, "AM", MIXERS), []
    while len(layout.converted) < 16:
        layout = Further().after(layout, MIXERS)
        found.append([layer for layer in range(16) if layer not in layout.converted])
    assert found == [[0, 4, 8, 12], [0, 8], [0], []]


def test_layers_and_patterns():
    before, two = Layout.over(4, "AAAM", MIXERS), MIXERS | {"N": {"mixer": "mamba2"}}
    assert Further(layers=[2, 0]).after(before, MIXERS).pattern == "MAMM"
    assert Further(layers=[1], mixer="N").after(before, two).pattern == "ANAM"
    found = Further(pattern="ANMM").after(before, two)
    assert found.pattern == "ANMM" and found.mixers == two


STAGE = [
    ({"layers": [3]}, "layers names layer 3, which is converted already (M)"),
    ({"layers": [9]}, "layers names layer 9, and the model has the layers 0 to 3"),
    ({"layers": [1, 1]}, "names a layer twice"),
    ({"layers": []}, "at least 1 item"),
    ({"layers": [1], "pattern": "M"}, "layers and pattern both say"),
    ({"layers": [1], "mixer": "N"}, "mixer is 'N', but the recipe's mixers are M; name one"),
    ({"pattern": "AM", "mixer": "M"}, "the letters of pattern already name the mixers"),
    ({"pattern": "am"}, "capital letters"),
    ({"pattern": "AAAA"}, "layer 1 is converted already (M), and its attention cannot be restored"),
    ({"pattern": "XM"}, "uses 'X', but no mixer is given for it"),
    ({"pattern": "MMMMMM"}, "names 6 layers, but the model has 4"),
    ({"pattern": "AM"}, "all layers of the layout are converted already"),
    ({"pattern": {"by": "even"}}, "`keep`, the number of layers that keep attention, is missing"),
    ({"pattern": {"keep": 1}}, "by: even spreads them"),
    ({"pattern": {"keep": 1.5, "by": "even"}}, "keep is 1.5"),
    ({"pattern": {"keep": True, "by": "even"}}, "keep is True"),
    ({"pattern": {"keep": 1, "by": "even", "window": 4}}, "by: even has no option but keep; leave 'window' out"),
    ({"pattern": {"keep": 2, "by": "even"}}, "2 of 4 layers, and 2 have attention: none would be converted"),
    ({"pattern": {"keep": 1, "by": "evn"}}, "there is no scorer 'evn'; did you mean 'even'"),
    ({"pattern": {"keep": 1, "by": "kl", "toknes": 3}}, "toknes is not a key here; did you mean 'tokens'"),
    ({"pattern": {"keep": 1, "by": "kl", "rest": "M"}}, "replace.mixer names the letter"),
    (
        {"pattern": {"keep": 1, "by": "retrieval-heads"}},
        "cannot choose layers of a student that has mixers: it chooses single",
    ),
    (
        {"pattern": {"keep": 1, "by": "kl", "protect": [1]}},
        "protect names layer 1, and the layers with attention are [0, 2]",
    ),
    ({"pattern": {"keep": 2, "by": "kl"}}, "none would be converted; keep fewer"),
    ({"pattern": {"keep": 1, "by": "recall", "length": 4096}}, "stages.replace.pattern.length is 4096"),
    ({"layers": [0], "tokens": "many"}, "tokens is 'many'"),
    ({"layers": [0], "mixr": "M"}, "mixr is not a key here; did you mean 'mixer'"),
]


@pytest.mark.parametrize(("options", "said"), STAGE, ids=[row[1] for row in STAGE])
def test_stages_that_cannot_be(tiny_recipe, options, said):
    tiny_recipe["stages"].insert(1, {"replace": options})
    with pytest.raises(UserError) as found:
        make_plan(check(tiny_recipe, "tiny.yaml"))
    assert said in str(found.value) and "stages.replace" in str(found.value)


def test_none_is_left(tiny_recipe):
    tiny_recipe["stages"] += [{"replace": {"pattern": "M"}}, {"replace": {"layers": [0]}}]
    with pytest.raises(UserError, match=r"stages.5: every layer is converted already; no attention layer is left"):
        make_plan(check(tiny_recipe, "tiny.yaml"))


def test_rates_and_frozen_parts_are_checked_under_the_layout_of_their_stage(tiny_recipe):
    tiny_recipe["stages"] = [
        {"initialise": {"tokens": 64}},
        {"imitate": {"tokens": 64, "lr": 1e-3, "freeze": ["q"]}},
        {"replace": {"pattern": "M"}},
        {"imitate": {"tokens": 64, "lr": 1e-3, "freeze": ["q", "k"]}},
    ]
    with pytest.raises(UserError, match=r"no layer of the student keeps attention; leave freeze out"):
        make_plan(check(tiny_recipe, "tiny.yaml"))


def test_a_plan_says_what_each_step_converts_and_trains(tiny_recipe):
    tiny_recipe["mixers"]["N"] = {"mixer": "mamba2"}
    tiny_recipe["stages"] += [
        {"replace": {"layers": [0], "mixer": "N"}},
        {"align": {"tokens": 256, "lr": 1e-3}},
        {"imitate": {"tokens": 256, "lr": 1e-3, "train": "mixers"}},
    ]
    recipe = check(tiny_recipe, "tiny.yaml")
    plan = make_plan(recipe)
    assert plan.layout.pattern == "AMAM" and plan.layout.mixers.keys() == {"M"}
    assert {name: layout.pattern for name, layout in plan.replaced.items()} == {"replace": "NMAM"}
    assert plan.last.mixers.keys() == {"M", "N"} and plan.trained["replace"] == 0
    old, new, both = plan.trained["imitate"], plan.trained["align (5)"], plan.trained["imitate (6)"]
    assert new > 0 and both == old + new
    layouts = layouts_of(recipe, first_layout(recipe, 4, "x"), "x")
    assert [layout.pattern for layout in layouts] == ["AMAM"] * 4 + ["NMAM"] * 3

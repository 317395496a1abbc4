"""`distill bench layouts`: every layout trains on one recipe's layers, and a second call finds the rows."""

import pytest
import yaml

from distill.benchmarks import layouts
from distill.errors import UserError
from distill.recipe_file import load


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_layout_takes_the_recipes_layers(name):
    base = load("quickstart")
    made = layouts.of_layout(base, name)
    whole, kept = (made.pattern * 30)[:30], (base.pattern * 30)[:30]
    assert [a == "A" for a in whole] == [b == "A" for b in kept]
    assert set(made.pattern) - {"A"} == set(made.mixers) and made.data == base.data and made.stages == base.stages


@pytest.mark.matrix
@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_layout_is_trained_once(name, tiny_recipe, tmp_path, capsys, monkeypatch):
    letters, mixers, meta_tokens = layouts.LAYOUTS[name]
    monkeypatch.setitem(layouts.LAYOUTS, name, (letters[-4:], mixers, meta_tokens))  # the tiny teacher has four layers
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe | {"pattern": "AM" if len(letters) == 1 else "M"}))
    result = layouts.run(load(path), [name], runs=tmp_path / "runs")
    row = result["rows"][0]
    assert row["kl"] > 0 and row["cache_bytes"] > 0 and row["passkey"].keys() == {64}
    assert set(row["tokens_per_second"]) >= {"align", "imitate"} and layouts.table(result).row_count == 1
    again = layouts.run(load(path), [name], runs=tmp_path / "runs")["rows"][0]
    assert again["seconds"] == row["seconds"]


def test_an_unknown_layout(tmp_path):
    with pytest.raises(UserError, match="no layout 'Smaba'; did you mean 'Samba'"):
        layouts.run(load("quickstart"), ["Smaba"], runs=tmp_path)

"""docs/extending.md has a section for each kind and recipes of less than 40 lines (`test_readme.py` runs them)."""

import re
from pathlib import Path

import pytest
import torch

from hqlt.registry import HOME
from hqlt.study import read_study
from tests.laws import close, normal

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
RECIPES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_kind_has_a_section():
    anchors = {"#" + title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)", PAGE, flags=re.MULTILINE)}
    links = dict(re.findall(r"^\| \[`(\w+)`\]\((#[\w-]+)\)", PAGE, flags=re.MULTILINE))
    assert links.keys() == HOME.keys()
    assert {*links.values(), "#a-backend"} <= anchors


def test_recipes_are_short():
    assert RECIPES
    assert max(recipe.count("\n") for recipe in RECIPES) < 40


def test_the_study_of_the_recipe_is_read(tmp_path):
    exec(
        compile(next(recipe for recipe in RECIPES if "class Majority" in recipe), "<documentation>", "exec"),
        {"__name__": "__main__"},
    )
    (study,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "study.yaml").write_text(study)
    assert {cell.task for cell in read_study(tmp_path / "study.yaml").cells()} == {"majority"}
    wrong = study.replace("length: 63", "lenght: 63")
    (tmp_path / "study.yaml").write_text(wrong)
    with pytest.raises(
        ValueError, match=r"options: key: expected one of 'length', got 'lenght'; did you mean 'length'\?"
    ):
        read_study(tmp_path / "study.yaml")


@torch.no_grad()
def test_the_rule_of_the_recipe_token_by_token():
    """Its gates are a single tensor, which fused operations must not unpack."""
    code = next(recipe for recipe in RECIPES if "class Fading" in recipe)
    names = {"__name__": "__main__"}
    exec(compile(code, "<documentation>", "exec"), names)
    layer, x, state, steps = names["layer"].double(), normal(2, 20, 64), None, []
    whole, _ = layer(x)
    for token in x.split(1, dim=1):
        y, state = layer(token, state)
        steps.append(y)
    close(torch.cat(steps, dim=1), whole)

"""Recipes for a card do what they promise: planned from the shapes of the model that they name,
they fit, and need what their first lines say. And tables of pages are those of the results."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import ROOT
from sweeps import swept

from benchmarks.pages import DOCS, TABLES, page
from benchmarks.recipes import NAMES, RECIPES, checkpoints, place_of
from leanlift import MemoryPlan
from leanlift.cli.settings import read_command
from leanlift.training import plan_of

GIB = 2**30
ALIKE = {"Qwen/Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B"}
"""Models that have the shapes of another."""

CHEAP = "examples/6gb/phi-3-mini.yaml"
EXAMPLES = [
    path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "examples").rglob("*.yaml"))
]
PROMISING = [name for name in EXAMPLES if "small" not in name]


def promised(text: str) -> tuple[int, float | None]:
    """The size of the card that the first comment of a recipe names, and what it says is needed."""
    head = re.match(r"(?:#.*\n)+", text)
    assert head is not None
    words = " ".join(line.lstrip("# ") for line in head[0].splitlines())
    card = re.search(r"card with (\d+) GB", words)
    assert card is not None, "a recipe names its card"
    said = re.search(r"(?:planned to need|the plan says) ([\d.]+) GiB", words)
    return int(card[1]), float(said[1]) if said else None


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of these tests: it has a config.json under each model's name."""
    place = tmp_path_factory.mktemp("shapes")
    with checkpoints(place):
        for name, like in ALIKE.items():
            shutil.copytree(like, name)
        yield place


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("name", swept(PROMISING, CHEAP))
def test_a_recipe_fits_the_card_that_it_names(name: str) -> None:
    card, said = promised((ROOT / name).read_text(encoding="utf-8"))
    asked = read_command("plan", ["--config", str(ROOT / name)])
    assert asked.args.model_name_or_path in {*NAMES.values(), *ALIKE}
    plan: MemoryPlan = plan_of(asked.args, asked.sft, cuda=True)
    assert plan.fits(card)
    if said is not None:
        assert plan.needed / GIB == pytest.approx(said, abs=0.06)


def test_recipes_are_those_that_are_made_and_the_page_has_them() -> None:
    made = {place_of(model, card).as_posix() for model, card in RECIPES}
    assert made == {name for name in EXAMPLES if name.count("/") == 2}
    text = (DOCS / "cards.md").read_text(encoding="utf-8")
    assert [name for name in made if f"(../{name})" not in text] == []
    for model, card in RECIPES:
        given = yaml.safe_load((ROOT / place_of(model, card)).read_text(encoding="utf-8"))
        assert given["model_name_or_path"] == NAMES[model]
        assert promised((ROOT / place_of(model, card)).read_text(encoding="utf-8"))[0] == card


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_a_page_is_that_of_its_result(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == page(name)
    assert page(name).count("\n| ") > 8

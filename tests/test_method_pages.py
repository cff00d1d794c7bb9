"""A page for each method: the same headings, its constants as they are in the configuration, its rows as measured."""

import json
import re

import pandas as pd
import pytest
from documents import FENCE, ROOT, section, text_of

from eval.method_pages import measured, modules, page_of, signed
from pso.config import load
from pso.entries import MethodEntry

HEADINGS = ["Equation", "Source", "Constants", "Deviations", "Measured result"]
PAPER, MINIATURE = load({"scale": "paper"}), load({"scale": "miniature"})
MODULES = modules(PAPER)
BUDGET = ("num_updates", "batch_size", "learning_rate")


def page(module: str) -> str:
    return page_of(module).read_text()


def constants(text: str) -> dict[tuple[str, str], tuple[str, str, str]]:
    """(entry, key) -> value, value in the miniature, where from; each once."""
    rows = re.findall(
        r"^\| (`.*`) \| `([\w.]+)` \| (.*?) \| (.*?) \| (.*) \|$", section(text, "Constants"), re.MULTILINE
    )
    found = {}
    for entries, key, *values in rows:
        for entry in re.findall(r"`(\w+)`", entries):
            assert (entry, key) not in found, f"{entry} {key} stands twice"
            found[entry, key] = tuple(values)
    return found


def shown(value) -> str:
    words = {None: "none", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def stated(method: MethodEntry) -> dict[str, str]:
    """What a page has to state of an entry: its objective, its budget and what it is trained on."""
    values = {f"objective.{key}": value for key, value in method.objective.items()}
    values |= {f"tune.{key}": getattr(method.tune, key) for key in BUDGET}
    values |= {key: value for key in ("data", "reward", "embeddings") if (value := getattr(method, key)) is not None}
    return {key: shown(value) for key, value in values.items()}


@pytest.mark.parametrize("module", MODULES)
def test_every_method_has_a_page_with_the_same_headings(module):
    assert re.findall(r"^## (.*)$", page(module), re.MULTILINE) == HEADINGS
    assert all(section(page(module), heading).strip() for heading in HEADINGS)
    assert "\n```math\n" in section(page(module), "Equation")
    assert f"`{module.replace('.', '/')}.py`" in section(page(module), "Source")


@pytest.mark.parametrize("module", MODULES)
def test_the_mathematics_is_what_github_shows(module):
    """It refuses the macro operatorname, and outside of a block Markdown takes the backslash of a punctuation."""
    text = page(module)
    inline = re.findall(r"\$([^$\n]+)\$", FENCE.sub("", text))
    assert r"\operatorname" not in text and "$$" not in text
    assert [code for code in inline if re.search(r"\\[,;!{}_]", code)] == []
    assert all(line.count("$") % 2 == 0 for line in FENCE.sub("", text).splitlines())


def test_no_page_is_of_another_method():
    assert sorted((ROOT / "docs" / "methods").iterdir()) == sorted(map(page_of, MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_the_constants_are_those_of_the_configuration(module):
    told = constants(page(module))
    entries = [name for name, entry in PAPER.methods.items() if entry.module == module]
    assert {entry for entry, _ in told} == set(entries)
    for name in entries:
        real, small = stated(PAPER.methods[name]), stated(MINIATURE.methods[name])
        of_entry = {key: values for (entry, key), values in told.items() if entry == name}
        assert set(real) <= set(of_entry), name
        for key, (value, miniature, source) in of_entry.items():
            if key.startswith("tune.") and key not in real:  # another setting of the loop that the page mentions
                field = key.removeprefix("tune.")
                real[key], small[key] = (shown(getattr(c.methods[name].tune, field)) for c in (PAPER, MINIATURE))
            assert (value, miniature) == (real[key], small[key]), f"{name}: {key}"
            assert source


def test_a_wrong_constant_is_noticed():
    text = page("pso.pso_offline")
    wrong = text.replace("| `objective.beta` | 50 |", "| `objective.beta` | 5 |")
    assert wrong != text
    assert (
        constants(wrong)["pso_offline", "objective.beta"][0] != stated(PAPER.methods["pso_offline"])["objective.beta"]
    )


# ---- the measured rows ----


@pytest.fixture
def results(tmp_path):
    """Made-up results of Tables 1 and 3: every row one above its base row in all columns, but for the first metric."""
    (tmp_path / "tables").mkdir()
    for name in MINIATURE.tables:
        table = MINIATURE.table_entries[name]
        lines = [
            {"eval_set": s, "label": r.label, **{m: float(r.method != "untuned") for m in table.metrics}}
            for s in table.eval_sets
            for r in table.all_rows
        ]
        pd.DataFrame(lines).to_csv(tmp_path / "tables" / f"{name}.csv", index=False)
        directions = [
            {"eval_set": s, "label": r.label, "base": base.label, "metric": table.metrics[0], "verdict": "agrees",
             "difference": 0.25, "interval": [0.125, 0.5]}
            for s in table.eval_sets
            for r in table.rows
            if (base := table.untuned_of(r)) is not None
        ]  # fmt: skip
        (tmp_path / "tables" / f"{name}.diff.json").write_text(json.dumps({"directions": directions}))
    claims = [
        {"table": "table1", "left": "Offline-PSO w/ SDXL-DMD2", "right": "SDXL-DMD2", "text": "It rises.",
         "verdict": "holds", "reason": None, "relation": "above", "metric": "pick_score", "estimate": 1.5,
         "interval": [1.0, 2.0]},
        {"table": "table1", "left": "SDXL", "right": "SDXL-DMD2", "text": "It is another's.", "verdict": "fails",
         "reason": None, "relation": "above", "metric": "pick_score", "estimate": 1.5, "interval": [1.0, 2.0]},
    ]  # fmt: skip
    (tmp_path / "claims.json").write_text(json.dumps(claims))
    return tmp_path


def test_no_difference_is_minus_nothing():
    assert signed(-0.2, None, 0) == "+0" and signed(-0.6, None, 0) == "-1"
    assert signed(-0.001, [-0.2, -0.0001], 1) == "+0.00 [-0.20, +0.00]"


def test_a_row_is_shown_against_its_untuned_model_with_the_intervals_that_are_known(results):
    told = measured(MINIATURE, results, "pso.pso_offline")
    (line,) = [line for line in told.splitlines() if line.startswith("| Offline-PSO w/ SDXL-DMD2 ") and "parti" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("Offline-PSO w/ SDXL-DMD2", "SDXL-DMD2", "parti_prompts", "1 / 0 / 0"),
        *("+0.25 [+0.12, +0.50]", "+1.0000", "+1.0000", "+1.000"),
    ]
    assert "SDXL-Turbo-1step | SDXL-Turbo-1step" in re.sub(r" +", " ", told)


def test_only_the_claims_about_it_are_told(results):
    told = measured(MINIATURE, results, "pso.pso_offline")
    assert "1 holds, 0 fails, 0 inconclusive" in told and "It rises." in told and "another's" not in told
    assert "+1.50 [+1.00, +2.00]" in told
    assert "No claim of the paper is about this method." in measured(MINIATURE, results, "baselines.spo")


def test_a_row_without_its_untuned_model_is_named(results):
    told = measured(MINIATURE, results, "baselines.dreambooth")
    assert "Left out, because the table has no untuned row of their model and steps: Dreambooth w/ SDXL." in told
    assert "| Dreambooth w/ SDXL " not in told


def test_the_pages_are_linked_from_the_folders_page():
    for module in MODULES:
        assert f"(methods/{page_of(module).name})" in text_of("docs/README.md")

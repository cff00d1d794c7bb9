"""What the configuration's entries must have in common: grids, rows, and a method's data and reward with its source."""

import ast

import pytest
from test_config import SHIPPED, nested, parse_shipped_files_once, refusal  # noqa: F401

from pso.checks import NUM_TIMES, SOURCES, source_of
from pso.config import ROOT, import_module, load

DMD2, ROW = "models.sdxl_dmd2", {"label": "x", "model": "sdxl_dmd2", "method": "untuned", "steps": 4}

# ---- grids ----

GRIDS = [  # key, grid, the sentence after the field
    (4, [999, 749, 499], "is [999, 749, 499], which are 3 times; expected as many as its key, 4."),
    (1, [999, 499], "is [999, 499], which are 2 times; expected as many as its key, 1."),
    (2, [499, 999], "is [499, 999]; expected different times from 999 to 0, falling."),
    (3, [999, 499, 499], "is [999, 499, 499]; expected different times from 999 to 0, falling."),
    (2, [1000, 499], "is [1000, 499]; expected different times from 999 to 0, falling."),
    (2, [499, -1], "is [499, -1]; expected different times from 999 to 0, falling."),
    (2, [], "is [], which are 0 times; expected as many as its key, 2."),
    (0, [], "is a grid of 0 steps; expected a key from 1 to 999."),
    (1000, "leading", "is a grid of 1000 steps; expected a key from 1 to 999."),
]


@pytest.mark.parametrize(("steps", "grid", "sentence"), GRIDS, ids=[f"{g[0]}-{g[1]}" for g in GRIDS])
def test_a_grid_that_no_sampler_takes_is_refused(steps, grid, sentence):
    assert refusal(nested(f"{DMD2}.grids", {steps: grid})) == f"{DMD2}.grids.{steps} {sentence}"


@pytest.mark.parametrize("key", [8, "8"])  # JSON makes text of a key
def test_a_grid_that_falls_and_is_as_long_as_its_key_is_taken(key):
    times = [999, 874, 749, 624, 499, 374, 249, 0]
    assert load(nested(f"{DMD2}.grids", {key: times})).models["sdxl_dmd2"].grids[8] == times


def test_every_grid_that_is_taken_makes_a_chain():
    from pso.models import chain_for

    named = {n: s for n in (1, 2, 7, 500, 501, NUM_TIMES - 1) for s in ("leading", "trailing")}
    for spacing in ("leading", "trailing"):
        entry = load(nested("models.sdxl.grids", dict.fromkeys(named, spacing) | {50: spacing})).models["sdxl"]
        assert [chain_for("sdxl", entry, n).num_steps for n in entry.grids] == list(entry.grids)
    with pytest.raises(ValueError, match="timesteps is"):
        chain_for("sdxl", entry.model_copy(update={"grids": {NUM_TIMES: "leading"}}), NUM_TIMES)


TUNED = [
    ({"tuned_steps": 8}, "tuned_steps is 8; expected a key of its grids: 4, 2, 1."),
    ({"tuned_steps": 1}, "tuned_steps is 1; expected at least 2, because the last step is deterministic and is not "
     "trained."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), TUNED, ids=[str(t[0]) for t in TUNED])
def test_a_model_that_cannot_be_tuned_is_refused(change, sentence):
    assert refusal(nested(DMD2, change)).startswith(f"{DMD2}.{sentence}")


@pytest.mark.parametrize("change", [{"tuned_steps": 2}, {"sampler": "ancestral"}])
def test_a_model_that_can_be_tuned_is_taken(change):
    assert load(nested(DMD2, change)).models["sdxl_dmd2"].model_dump().items() >= change.items()


def test_the_stochastic_samplers_are_those_of_the_chains():
    from pso.checks import STOCHASTIC
    from pso.models import SAMPLERS

    assert {name for name, kind in SAMPLERS.items() if kind.stochastic} == set(STOCHASTIC)


# ---- rows ----

ROWS = [
    ({"steps": 8}, "steps is 8; expected a key of models.sdxl_dmd2.grids: 4, 2, 1."),
    ({"model": "sdxl", "steps": 4}, "steps is 4; expected a key of models.sdxl.grids: 50."),
    ({"model": "sdxl_dpo", "method": "pso_offline", "steps": 50}, "method is 'pso_offline' (text); expected untuned, "
     "because models.sdxl_dpo has no lora_rank or no tuned_steps."),
    ({"model": "sdxl", "method": "pso_offline", "steps": 50}, "method is 'pso_offline' (text); expected one with "
     "objective.times, because the sampler of models.sdxl, 'euler' (text), is deterministic and its steps have no "
     "log-probability."),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["rows", "extra_rows"])
@pytest.mark.parametrize(("change", "sentence"), ROWS, ids=[str(r[0]) for r in ROWS])
def test_a_row_that_its_model_cannot_fill_is_refused(kind, change, sentence):
    rows = [*SHIPPED["tables"]["table2"]["rows"], ROW | change]
    assert refusal(nested(f"tables.table2.{kind}", rows)) == f"tables.table2 row 'x' {sentence}"


@pytest.mark.parametrize("method", ["sft", "dpo_transplant", "mapo_adapted"])
def test_a_deterministic_model_can_be_trained_at_given_times(method):
    rows = [*SHIPPED["tables"]["table2"]["rows"], ROW | {"model": "sdxl", "method": method, "steps": 50}]
    assert load(nested("tables.table2.rows", rows)).table_entries["table2"].rows[-1].method == method


def test_a_row_that_is_missing_may_name_any_steps():
    for change in ({}, {"steps": 2}, {"steps": 8, "missing": "not built yet"}):
        rows = [*SHIPPED["tables"]["table2"]["rows"], ROW | change]
        assert load(nested("tables.table2.rows", rows)).table_entries["table2"].rows[-1].label == "x"


# ---- a method and its source ----

METHODS = SHIPPED["methods"]
PAIRS = "preference_parquet or imagefolder"
TARGETS = f"{PAIRS} or dreambooth"
PROMPTS = f"caption_parquet or caption_json or parti_tsv or {PAIRS}"
DATA = [  # method, data, its format, what is expected
    *((m, "training_prompts_4k", "caption_json", f"{PAIRS}, which PreferencePairs of pso.pso_offline")
      for m in ("pso_offline", "pso_offline_sampled")),
    ("pso_offline", "parti_prompts", "parti_tsv", f"{PAIRS}, which PreferencePairs of pso.pso_offline"),
    ("pso", "pickapic_test", "caption_parquet", f"{TARGETS}, which TargetsAgainstModel of pso.pso"),
    ("diffusion", "training_prompts_4k", "caption_json", f"{TARGETS}, which Targets of baselines.diffusion"),
    ("pso_offline", "dreambooth_prompts", "dreambooth", f"{PAIRS}, which PreferencePairs of pso.pso_offline"),
    ("pso_online", "dreambooth_prompts", "dreambooth", f"{PROMPTS}, which OnlinePairs of pso.pso_online"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "data", "kind", "expected"), DATA, ids=[f"{d[0]}-{d[1]}" for d in DATA])
def test_data_that_a_source_cannot_work_from_is_refused(method, data, kind, expected):
    text = refusal(nested(f"methods.{method}.data", data))
    assert text == f"methods.{method}.data is '{data}' (text), whose format is {kind}; expected {expected} needs."


def test_pairs_of_a_folder_have_no_embeddings():
    assert refusal(nested("methods.rpo_adapted.data", "style_pictures")) == (
        "methods.rpo_adapted.data is 'style_pictures' (text), whose format is imagefolder; expected "
        "preference_parquet, which ContrastPairs of baselines.rpo needs."
    )


def test_a_metric_is_a_copy_only_of_one_that_there_is():
    text = refusal(nested("metrics.spm_distilled.copy_of", "pick_scor"))
    assert text == "metrics.spm_distilled.copy_of is 'pick_scor' (text), which has no entry; did you mean pick_score?"


def test_a_probe_measures_only_metrics_that_there_are():
    text = refusal(nested("methods.pso_offline.tune.probe_metrics", ["sharpness", "sharpnes"]))
    assert text == (
        "methods.pso_offline.tune.probe_metrics is 'sharpnes' (text), which has no entry; did you mean sharpness?"
    )


@pytest.mark.parametrize("data", ["training_prompts_4k", "pickapic_validation", "parti_prompts", "pickapic_v2"])
def test_online_pairs_work_from_any_list_of_prompts(data):
    assert load(nested("methods.pso_online.data", data)).methods["pso_online"].data == data


@pytest.mark.parametrize("method", ["pso_online", "pso_online_released"])
def test_online_pairs_need_a_reward(method):
    text = refusal(nested(f"methods.{method}.reward", None))
    assert text == (
        f"methods.{method}.reward is None; expected the name of a metric, by which OnlinePairs of pso.pso_online "
        "ranks its samples."
    )
    assert METHODS["pso_offline"].get("reward") is None  # others need none


def test_a_module_from_elsewhere_is_not_read_for_its_source():
    entry = METHODS["pso"] | {"module": "nowhere.at_all", "data": "training_prompts_4k"}
    assert load({"methods": {"mine": entry}}).methods["mine"].module == "nowhere.at_all"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('SOURCE = "Targetz"', "Targetz"),
        ("", None),
        ("SOURCE = f()", None),
        ('def f():\n    SOURCE = "Targets"', None),
    ],
)
def test_a_module_of_this_repository_needs_a_source_that_there_is(monkeypatch, tmp_path, line, found):
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "diffusion.py").write_text(f"{line}\n")
    (tmp_path / "baselines" / "dreambooth.py").write_text((ROOT / "baselines" / "dreambooth.py").read_text())
    monkeypatch.setattr("pso.checks.ROOT", tmp_path)
    (tmp_path / "pso").mkdir()
    for name in ("pso", "pso_offline", "pso_online"):
        (tmp_path / "pso" / f"{name}.py").write_text((ROOT / "pso" / f"{name}.py").read_text())
    assert refusal() == (
        f"methods.diffusion.module is 'baselines.diffusion' (text), whose SOURCE is {found}; expected a line SOURCE = "
        f"with one of {', '.join(SOURCES)} in it."
    )


@pytest.mark.parametrize("module", sorted({entry["module"] for entry in METHODS.values()}))
def test_the_source_that_is_read_is_the_modules_own(module):
    import importlib

    assert source_of(module) == importlib.import_module(module).SOURCE in SOURCES


def test_sources_and_their_formats_are_those_of_the_code():
    from pso import sources
    from pso.data import READERS

    tree = ast.parse((ROOT / "pso" / "sources.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    elsewhere = {name for name in SOURCES if ":" in name}
    assert {name for name in classes if hasattr(getattr(sources, name), "batch")} == set(SOURCES) - elsewhere
    assert all(hasattr(import_module(name, "SOURCE"), "batch") for name in elsewhere)
    assert set(SOURCES["OnlinePairs"]) == {*READERS, "preference_parquet", "imagefolder"}

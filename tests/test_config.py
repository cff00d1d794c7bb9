"""Reading workflow/config: what is accepted, what is refused and in which words."""

import copy
import functools
import shutil

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pso import config as reader
from pso.config import CONFIG_DIR, ConfigError, load
from pso.entries import ENTRIES

SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIG_DIR.glob("*.yaml")}
FIRST = {kind: next(iter(SHIPPED[kind])) for kind in ENTRIES}  # an entry of each file
CLAIM = f"claims.{FIRST['claims']}"


@pytest.fixture(autouse=True, scope="module")
def parse_shipped_files_once():
    """YAML in Python is slow; the shipped files do not change during a test run."""
    original = reader._read
    cached = functools.cache(original)
    reader._read = lambda path: cached(path) if path.parent == CONFIG_DIR else original(path)
    yield
    reader._read = original


def refusal(overrides=None, folder=CONFIG_DIR) -> str:
    """The one sentence with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load(overrides, folder)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")), text
    return text


def nested(path: str, value) -> dict:
    """Overrides that set one value; names are separated by dots."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def folder_with(tmp_path, kind: str, text: str):
    """A copy of the shipped folder with one file replaced."""
    folder = tmp_path / "config"
    folder.mkdir()
    for path in CONFIG_DIR.glob("*.yaml"):
        shutil.copyfile(path, folder / path.name)
    (folder / f"{kind}.yaml").write_text(text)
    return folder


def renamed(kind: str, old: str, new: str, top: bool = False) -> str:
    """A shipped file in which a key of its first entry (or of the file) has another name."""
    content = copy.deepcopy(SHIPPED[kind])
    holder = content if top else content[FIRST[kind]]
    holder[new] = holder.pop(old, 1)
    return yaml.safe_dump(content, sort_keys=False)


# ---- what is accepted ----


@pytest.mark.parametrize("scale", SHIPPED["scales"])
def test_the_shipped_folder_loads_for_every_scale(scale):
    config = load({"scale": scale})
    assert config.scale == scale
    assert set(config.models) == set(SHIPPED["models"]) and set(config.methods) == set(SHIPPED["methods"])


def test_a_scale_lays_its_settings_over_the_entries_and_keeps_the_rest():
    tuning = load(nested("scales.smoke.methods.pso_online.tune", {"num_updates": 7}) | {"scale": "smoke"})
    entry = tuning.methods["pso_online"]
    assert entry.tune.num_updates == 7
    assert entry.tune.weight_decay == 1.0e-6 and entry.reward == "pick_score"
    assert entry.objective["beta"] == SHIPPED["methods"]["pso_online"]["objective"]["beta"]


def test_a_scale_that_is_not_chosen_changes_nothing():
    changed = load(nested("scales.smoke.methods.pso_online.tune.num_updates", 7) | {"scale": "miniature"})
    assert changed.methods == load({"scale": "miniature"}).methods


def test_overrides_do_not_leak_into_the_next_load():
    before = load()
    load(nested("models.sdxl_dmd2.title", "another") | {"scale": "smoke"})
    assert load() == before


# ---- what is refused: keys ----

OPTIONAL = {  # of each file: a misspelling, the right key
    "scales": ("eval_sed", "eval_seed"),
    "models": ("lora_rnk", "lora_rank"),
    "methods": ("rewad", "reward"),
    "metrics": ("only_scale", "only_scales"),
    "datasets": ("num_row", "num_rows"),
    "tables": ("extra_row", "extra_rows"),
    "claims": ("shar", "share"),
}
REQUIRED = {
    "scales": "eval_batch",
    "models": "sampler",
    "methods": "tune",
    "metrics": "decimals",
    "datasets": "format",
    "tables": "caption",
    "claims": "relation",
}


@pytest.mark.parametrize("kind", OPTIONAL)
def test_a_misspelt_key_is_answered_with_the_right_one(tmp_path, kind):
    wrong, right = OPTIONAL[kind]
    text = refusal(folder=folder_with(tmp_path, kind, renamed(kind, right, wrong)))
    assert text == f"{kind}.{FIRST[kind]}.{wrong} is not a known key; did you mean {right}?"


def test_a_misspelt_key_of_config_yaml_is_answered_with_the_right_one(tmp_path):
    folder = folder_with(tmp_path, "config", (CONFIG_DIR / "config.yaml").read_text() + "\ntabels: [table1]\n")
    assert refusal(folder=folder) == "config.tabels is not a known key; did you mean tables?"


@pytest.mark.parametrize("kind", REQUIRED)
def test_a_missing_key_is_named(tmp_path, kind):
    key = REQUIRED[kind]
    text = refusal(folder=folder_with(tmp_path, kind, renamed(kind, key, f"{key}x")))
    assert text == f"{kind}.{FIRST[kind]}.{key} is missing; it is needed."


@pytest.mark.parametrize("key", ["scale", "seeds"])
def test_a_missing_key_of_config_yaml_is_named(tmp_path, key):
    text = refusal(folder=folder_with(tmp_path, "config", renamed("config", key, f"{key}x", top=True)))
    assert text.startswith(f"config.{key} is ")


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("models.sdxl_dmd2.unet.repos", "repo"),
        ("methods.pso.tune.learning_rat", "learning_rate"),
        ("scales.miniature.standin.dmd2.warm_start.num_step", "num_steps"),
        ("metrics.pick_score.checkpoint.procesor", "processor"),
        ("scal", "scale"),
    ],
)
def test_a_misspelt_key_is_found_at_every_depth(path, right):
    where = path if "." in path else f"config.{path}"
    assert refusal(nested(path, 1)) == f"{where} is not a known key; did you mean {right}?"


def test_a_key_that_resembles_nothing_is_answered_with_all_keys():
    text = refusal(nested("models.sdxl.xyz", 1))
    assert text.startswith("models.sdxl.xyz is not a known key; known keys: base, ") and "vae" in text


# ---- what is refused: values ----


def test_a_number_that_yaml_reads_as_text_is_answered_with_the_right_spelling(tmp_path):
    whole = yaml.safe_dump(SHIPPED["methods"], sort_keys=False)
    text = refusal(folder=folder_with(tmp_path, "methods", whole.replace("rate: 1.0e-05", "rate: 1e-5", 1)))
    advice = "methods.pso_offline.tune.learning_rate is '1e-5' (text); expected a number; YAML reads it as text, write "
    assert text == f"{advice}1.0e-05."
    assert yaml.safe_load(text.removeprefix(advice).removesuffix(".")) == 1e-5


def test_the_advice_for_a_whole_number_as_text_is_a_whole_number():
    assert refusal(nested("scales.miniature.eval_batch", "8")).endswith("write 8.")


WRONG = [  # field, value, how the sentence shows it, what was expected
    ("models.sdxl_dmd2.guidance_scale", -1.0, "-1.0", "a number of at least 0"),
    ("models.sdxl_dmd2.sampler", "ddpm", "'ddpm' (text)", "'renoise', 'ancestral'"),
    ("models.sdxl_dmd2.lora_targets", "to_q", "'to_q' (text)", "a list"),
    ("models.sdxl_dmd2.lora_rank", 16.0, "16.0", "a whole number"),
    ("models.sdxl_dmd2.title", 1, "1", "a text"),
    ("methods.pso.tune.learning_rate", -1.0, "-1.0", "a number above 0"),
    ("methods.pso.tune.learning_rate", True, "True", "a number"),
    ("methods.pso.tune.weight_decay", -1.0, "-1.0", "a number of at least 0"),
    ("methods.pso.tune.num_updates", -1, "-1", "a number above 0"),
    ("methods.pso.tune.num_updates", None, "None", "a whole number"),
    ("methods.pso.objective", [1], "[1]", "a mapping"),
    ("metrics.pick_score.decimals", -1, "-1", "a number of at least 0"),
    ("metrics.pick_score.higher_is_better", "no", "'no' (text)", "true or false"),
    ("datasets.parti_prompts.format", "csv", "'csv' (text)", "'parti_tsv'"),
    ("datasets.parti_prompts.num_rows", 0, "0", "a number above 0"),
    ("claims.new.text", 1, "1", "a text"),
    ("scales.miniature.standin.num_prompts.x", -1, "-1", "a number above 0"),
    ("scales.miniature.dtype", "float8", "'float8' (text)", "'float32'"),
    ("seeds", 0, "0", "a list"),
    ("tables", "table1", "'table1' (text)", "a list"),
    ("log_with", "wandb", "'wandb' (text)", "a list"),
]


@pytest.mark.parametrize(("field", "value", "shown", "expected"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_value_names_field_value_and_expectation(field, value, shown, expected):
    name = field if "." in field else f"config.{field}"
    text = refusal(nested(field, value))
    assert text.startswith(f"{name} is {shown}; expected "), text
    assert expected in text.split("; expected ")[1], text


NAMES = [  # field, wrong name, how the sentence calls the field, a name it offers
    ("scale", "nope", "config.scale", "miniature"),
    ("tables", ["tabel1"], "config.tables[0]", "table1"),
    ("methods.pso_online.data", "pickapic_v3", "methods.pso_online.data", "pickapic_v2"),
    ("methods.pso_online.reward", "pick_scor", "methods.pso_online.reward", "pick_score"),
    ("methods.pso_online.tune.probe_reward", "nothing", "methods.pso_online.tune.probe_reward", "pick_score"),
    ("tables.table1.metrics", ["pick_scores"], "tables.table1.metrics", "pick_score"),
    ("tables.table1.extra_metrics", ["sharpnes"], "tables.table1.metrics", "sharpness"),
    ("tables.table1.eval_sets", ["parti_prompt"], "tables.table1.eval_sets", "parti_prompts"),
    ("tables.table1.rows", [{"label": "x", "model": "sdx", "method": "untuned", "steps": 50}],
     "tables.table1 row 'x' model", "sdxl"),
    ("tables.table1.rows", [{"label": "x", "model": "sdxl", "method": "untund", "steps": 50}],
     "tables.table1 row 'x' method", "untuned"),
    *((f"{CLAIM}.{key}", wrong, f"{CLAIM}.{key}", SHIPPED["claims"][FIRST["claims"]][key])
      for key, wrong in (("table", "tabl1"), ("left", "nobody"), ("right", "nobody"), ("metric", "nothing"))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "wrong", "called", "offered"), NAMES, ids=[f"{n[0]}-{i}" for i, n in enumerate(NAMES)]
)
def test_a_name_without_an_entry_is_answered_with_one_that_has(field, wrong, called, offered):
    text = refusal(nested(field, wrong))
    shown = wrong[0] if isinstance(wrong, list) else wrong
    assert text.startswith(called) and offered in text.split(";")[1], text
    assert repr(shown) in text or repr(shown.get("model")) in text or repr(shown.get("method")) in text


def test_an_unknown_tracker_is_answered_with_those_there_are():
    text = refusal({"log_with": ["tensorbord"]})
    assert text == "config.log_with.0 is 'tensorbord' (text); expected 'tensorboard' or 'wandb'."


def test_a_row_with_numbers_needs_model_and_method():
    row = {"label": "x", "model": "sdxl", "steps": 50}
    assert refusal(nested("tables.table1.rows", [row])) == (
        "tables.table1 row 'x' needs model and method, or the reason in missing."
    )


def test_a_share_belongs_to_at_least_share_alone():
    text = refusal(nested(CLAIM, {"relation": "above", "share": 0.5}))
    assert text.startswith(f"{CLAIM}.share is 0.5; expected a number with at_least_share, else none")


@pytest.mark.parametrize("scale", SHIPPED["scales"])
def test_a_wrong_value_of_a_scale_is_named_with_the_scale(scale):
    where = f"scales.{scale}.methods.pso.tune.num_updates"
    assert refusal(nested(where, -1) | {"scale": scale}) == f"{where} is -1; expected a number above 0."


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("scales.smoke.models.sdxl_dmd2.resolutio", "is not a known key; did you mean resolution?"),
        ("scales.smoke.datasets.parti_promts", "is not a known key; did you mean parti_prompts?"),
        ("scales.smoke.claims", "is not a known key; known keys: "),
    ],
)
def test_a_misspelt_key_of_a_scales_overrides_is_named_with_the_scale(path, sentence):
    assert refusal(nested(path, {}) | {"scale": "smoke"}).startswith(f"{path} {sentence}")


# ---- what is refused: files ----


def test_a_missing_file_is_named(tmp_path):
    folder = folder_with(tmp_path, "metrics", "")
    (folder / "metrics.yaml").unlink()
    assert refusal(folder=folder) == f"{folder / 'metrics.yaml'} is missing; it is one of the configuration's files."


def test_invalid_yaml_is_one_line_with_the_place(tmp_path):
    text = refusal(folder=folder_with(tmp_path, "models", "sdxl:\n  title: [SDXL\n  base: x\n"))
    assert "models.yaml is not valid YAML: " in text and "line 3" in text


@pytest.mark.parametrize(("content", "kind"), [("- a\n- b\n", "list"), ("", "NoneType"), ("just text\n", "str")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content, kind):
    text = refusal(folder=folder_with(tmp_path, "claims", content))
    assert text.endswith(f"claims.yaml holds {kind}; expected a mapping of names to entries.")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_stands_in_one_place_is_accepted_or_refused_in_one_line(data):
    kind = data.draw(st.sampled_from(sorted(ENTRIES)))
    path, value = [kind], SHIPPED[kind]
    while isinstance(value, dict) and value and (len(path) < 2 or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from(list(value))))
        value = value[path[-1]]
    junk = data.draw(st.sampled_from([None, "a\nb", "", -1, 0.5, True, [], [None], {}, {"x": {}}, float("nan"), 1e400]))
    for name in reversed(path):
        junk = {name: junk}
    scale = data.draw(st.sampled_from(sorted(SHIPPED["scales"])))
    try:
        load(junk | ({"scale": scale} if kind != "scales" else {}))
    except ConfigError as error:
        assert "\n" not in str(error), error


def test_a_scale_that_is_a_list_is_refused_in_one_line():
    refusal({"scale": ["smoke"]})


def test_what_the_user_asks_for_goes_before_what_the_scale_deviates_in():
    tune = SHIPPED["scales"]["smoke"]["methods"]["pso_offline"]["tune"]
    asked = load({"scale": "smoke", "methods": {"pso_offline": {"tune": {"learning_rate": 3.0e-3}}}})
    found = asked.methods["pso_offline"].tune
    assert found.learning_rate == 3.0e-3 != tune["learning_rate"]
    assert found.num_updates == tune["num_updates"] != SHIPPED["methods"]["pso_offline"]["tune"]["num_updates"]

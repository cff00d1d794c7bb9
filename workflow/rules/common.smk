# Look-ups only. Everything about models, methods and tables comes from pso.config, which is torch-free.

from pso.checks import PAIRS, source_of
from pso.config import job_environment, load
from pso.entries import UNTUNED
from pso.figures import figure_names
from pso.hub import is_outside
from pso.imagefolder import METADATA
from pso.paths import LORA_FILE
from pso.provenance import UserError, fingerprint
from pso.runs import jobs, metrics, where_results_lie


configfile: str(ROOT / "workflow" / "config" / "config.yaml")


try:
    CONFIG = load(dict(config), ROOT / "workflow" / "config")
except UserError as error:
    sys.exit(f"config: {error}")

SCALE = CONFIG.scale
STANDIN = CONFIG.scale_entry.standin
BASE = f"results/{SCALE}"
HUB = f"{BASE}/hub"
PUBLISHED = STANDIN.published
HUB_STEPS = (
    "vae",
    "clip",
    "data",
    "style",
    "judges",
    "rewards",
    "teacher",
    "dmd2",
    "lcm",
    "turbo",
    "loras",
    "subjects",
    "likeness",
    *(f"published_{name}" for name in PUBLISHED),
)
PUBLISHED_STEPS = {run.repo: f"published_{name}" for name, run in PUBLISHED.items()}
UNET_STEPS = {  # repository of a UNet -> the step that makes it
    "stabilityai/stable-diffusion-xl-base-1.0": "teacher",
    "tianweiy/DMD2": "dmd2",
    "latent-consistency/lcm-sdxl": "lcm",
    "stabilityai/sdxl-turbo": "turbo",
    **PUBLISHED_STEPS,
}
LORA_STEPS = {
    "tianweiy/DMD2": "loras",
    "latent-consistency/lcm-lora-sdxl": "loras",
    **PUBLISHED_STEPS,
}
# repository of a scorer -> the step that makes it, where that is not `judges`
SCORER_STEPS = {
    "openai/clip-vit-base-patch32": "likeness",
    "facebook/dino-vits16": "likeness",
    "THUDM/ImageReward": "rewards",
    "xswu/HPSv2": "rewards",
}
SPM = CONFIG.scale_entry.preference_model
GATE = STANDIN.gate
FIGURES = [f"{BASE}/figures/{name}.png" for name in figure_names(CONFIG)]


os.environ.update(job_environment(dict(config)))


wildcard_constraints:
    task="|".join(
        sorted(
            {
                "published",
                *(
                    task
                    for t in CONFIG.table_entries.values()
                    for task in [t.task, *t.tasks]
                ),
            }
        )
    ),
    model="|".join(CONFIG.models),
    method="|".join(CONFIG.methods),
    dataset="|".join(CONFIG.datasets),
    metric="|".join(CONFIG.metrics),
    table="|".join(CONFIG.table_entries),
    seed=r"\d+",


# ---- params: everything that decides a result, and nothing that does not


def hub_settings(*names):
    return STANDIN.model_dump(include={"seed", *names})


def model_settings(model, steps=None):
    """A model as it is sampled; with `steps`, only on that grid."""
    found = CONFIG.models[model].model_dump(exclude={"title"})
    if steps is not None:
        found["grids"] = {steps: found["grids"][steps]}
    return found


def method_settings(method):
    entry = CONFIG.methods[method]
    found = entry.model_dump(exclude={"title": True, "tune": {"checkpoint_every"}})
    return {**found, "data": CONFIG.datasets[entry.data].model_dump()}


def source_modules(method):
    """Where a method's source has a module of its own, else nothing: pso.tune imports the others."""
    source = source_of(CONFIG.methods[method].module) or ""
    return [source] if ":" in source else []


def scorer_settings(metric):
    """What decides a score; how it is printed does not."""
    decides = {
        "module",
        "implementation",
        "settings",
        "checkpoint",
        "head",
        "architecture",
        "compared_with",
    }
    return CONFIG.metrics[metric].model_dump(include=decides)


# what tables, claims and figures read beside scores; they cost seconds, so any change makes them anew
VIEWED = {
    **dict.fromkeys(("seeds", "tables", "table_entries", "metrics", "methods"), True),
    "scale_entry": {"caption", "bootstrap_resamples", "eval_seed"},
}
VIEW = CONFIG.model_dump(include=VIEWED)


# ---- inputs


def hub_inputs(*steps):
    return [f"{HUB}/{step}.json" for step in steps]


def model_inputs(model):
    """The hub's steps that make a model's weights."""
    entry = CONFIG.models[model]
    parts = [*([entry.unet] if entry.unet else []), *entry.deltas]
    repos = [
        entry.base,
        *(part.repo for part in parts),
        *(d.minus for d in entry.deltas),
    ]
    unets = {UNET_STEPS[repo] for repo in repos if repo in UNET_STEPS}
    loras = {LORA_STEPS[lora.repo] for lora in entry.loras if lora.repo in LORA_STEPS}
    return hub_inputs(*sorted({"teacher"} | unets | loras))


def data_inputs(*datasets):
    """The hub's steps that make data sets."""
    formats = {CONFIG.datasets[name].format for name in datasets}
    return hub_inputs(
        *sorted({"subjects" if f == "dreambooth" else "data" for f in formats})
    )


def scorer_inputs(*names):
    """The hub's steps that make the checkpoints of metrics."""
    checkpoints = [CONFIG.metrics[name].checkpoint for name in names]
    steps = {SCORER_STEPS.get(c.repo, "judges") for c in checkpoints if c is not None}
    # both are tuned from a CLIP of the step `clip`, or read with its tokenizer
    tuned = steps & {"judges", "rewards"}
    return hub_inputs(*sorted(steps | ({"clip"} if tuned else set())))


def reward_inputs(method, model):
    """The hub's steps that make a run's judges; a head for each model is made by a step of its own."""
    names = CONFIG.methods[method].metrics
    heads = [CONFIG.metrics[name].head for name in names]
    own = any(head is not None and "{model}" in (head.file or "") for head in heads)
    return scorer_inputs(*names) + (
        hub_inputs(f"preference_model_{model}") if own else []
    )


def gate_inputs(model):
    """The verdict that a student draws what it is asked for; other models have no gate."""
    entry = CONFIG.models[model]
    student = GATE.steps in entry.grids
    gated = student and (entry.tuned_steps == GATE.steps or entry.loras)
    return hub_inputs(f"gate_{model}") if gated else []


def pair_inputs(dataset):
    """What a set of pairs is made from: a step of the hub, or the files of a folder of the user's own."""
    entry = CONFIG.datasets[dataset]
    if entry.format != "imagefolder":
        return data_inputs(dataset)
    if not is_outside(entry.repo):
        return hub_inputs("style")
    folder = Path(entry.repo) / entry.files
    return sorted(
        {
            str(folder / METADATA),
            *(str(path) for path in folder.rglob("*") if path.is_file()),
        }
    )


def pair_settings(model, dataset):
    """A model as it encodes pictures, and as it is sampled where its samples are the references."""
    if CONFIG.datasets[dataset].format == "imagefolder":
        return model_settings(model, CONFIG.models[model].tuned_steps)
    return CONFIG.models[model].model_dump(include={"base", "vae", "resolution"})


def tune_inputs(wildcards):
    method = CONFIG.methods[wildcards.method]
    found = model_inputs(wildcards.model) + gate_inputs(wildcards.model)
    if CONFIG.datasets[method.data].format in PAIRS:
        found.append(f"{BASE}/cache/{wildcards.model}/{method.data}.safetensors")
    else:
        found += data_inputs(method.data)
    if method.embeddings is not None:
        found.append(f"{BASE}/cache/{method.embeddings}/{method.data}.safetensors")
    return found + reward_inputs(wildcards.method, wildcards.model)


def image_jobs(wildcards):
    """Every run whose images a process makes: one model's of one task, all subjects."""
    return jobs(CONFIG, wildcards.model, wildcards.task)


def image_sets(wildcards):
    return sorted({job.eval_set for job in image_jobs(wildcards)})


def subject_pictures(wildcards):
    """What scores of a subject's images are made from beside them."""
    subjects = [
        name
        for name in image_sets(wildcards)
        if CONFIG.datasets[name].format == "dreambooth"
    ]
    return data_inputs(*subjects)


def lora_inputs(wildcards):
    found = {
        str(job.lora(SCALE)) for job in image_jobs(wildcards) if job.method != UNTUNED
    }
    return sorted(found)


def table_models(table):
    return sorted({row.model for row in CONFIG.table_entries[table].shown_rows})


def shown_steps():
    """Steps of the hub for models that tables asked for show: their gates and preference models."""
    shown = sorted({(job.model, job.method) for job in jobs(CONFIG)})
    gates = [path for model, _ in shown for path in gate_inputs(model)]
    heads = [
        path
        for model, method in shown
        if method != UNTUNED
        for path in reward_inputs(method, model)
    ]
    return sorted({*gates, *heads})


def table_scores(table):
    return [
        f"{BASE}/{CONFIG.table_entries[table].task}/{model}/scores.json"
        for model in table_models(table)
    ]


def reference(*tables):
    """The paper's cells of those tables that it has."""
    files = [ROOT / "eval" / "reference" / f"{table}.csv" for table in tables]
    return [str(path) for path in files if path.exists()]


def table_files(table):
    """The table, and its diff where the paper has it."""
    kinds = [
        "csv",
        "tex",
        "md",
        *(["diff.md", "diff.json"] if reference(table) else []),
    ]
    return [f"{BASE}/tables/{table}.{kind}" for kind in kinds]


def all_scores():
    return sorted({path for table in CONFIG.tables for path in table_scores(table)})


def target(*files, tables=CONFIG.tables):
    """Files, and the scores behind them: a fresh clone holds the files already, and Snakemake would be content."""

    def wanted(wildcards):
        for table in tables:
            if table not in CONFIG.tables:
                raise WorkflowError(
                    f"table {table} is not in config.tables; add --config tables=[{table}]."
                )
        scores = {path for table in tables for path in table_scores(table)}
        return [*files, *sorted(scores)]

    return wanted

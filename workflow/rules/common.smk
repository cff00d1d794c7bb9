# Look-ups only. Everything about models, methods and tables comes from pso.config, which is torch-free.

from pso.checks import PAIRS
from pso.config import job_environment, load
from pso.entries import UNTUNED
from pso.figures import KINDS, figure_names
from pso.params import model_params, pair_params, run_modules, run_params, scorer_params
from pso.paths import LORA_FILE, manifest, model_dir, reference_file
from pso.provenance import UserError, fingerprint
from pso.resources import Needs
from pso.runs import calibrated, calibrations, jobs, metrics, where_results_lie
from pso.steps import Steps, slug
from pso.visits import reads_texts, text_sets


configfile: str(ROOT / "workflow" / "config" / "config.yaml")


try:
    CONFIG = load(dict(config), ROOT / "workflow" / "config")
except UserError as error:
    sys.exit(f"config: {error}")

SCALE = CONFIG.scale
STANDIN = CONFIG.scale_entry.standin
BASE = f"results/{SCALE}"
HUB = f"{BASE}/hub"
STEPS = Steps(CONFIG)
GATE = STANDIN.gate if STANDIN else None
NEEDS = Needs(CONFIG)
SPM = CONFIG.scale_entry.preference_model
FIGURES = [
    f"{BASE}/figures/{name}.{kind}" for name in figure_names(CONFIG) for kind in KINDS
]


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
    base="|".join(sorted({slug(entry.base) for entry in CONFIG.models.values()})),


# ---- params


def hub_settings(*names):
    """Of a step of the stand-in hub."""
    return STANDIN.model_dump(include={"seed", *names})


# what tables, claims and figures read beside scores; they cost seconds, so any change makes them anew
VIEWED = {
    **dict.fromkeys(("seeds", "tables", "table_entries", "metrics", "methods"), True),
    "scale_entry": {"caption", "bootstrap_resamples", "eval_seed"},
}
VIEW = CONFIG.model_dump(include=VIEWED)


# ---- resources


def needs(kind, job=""):
    """Minutes and host memory of a rule; its jobs are named by a text with wildcards, or a function of them."""

    def name(w):
        return job(w) if callable(job) else job.format(**w)

    return {
        "runtime": lambda w, attempt: NEEDS.minutes(kind, name(w), attempt),
        "mem_mb": lambda w, attempt: NEEDS.mem_mb(kind, name(w), attempt),
    }


# ---- snakemake --report


def shown(path, caption, category, subcategory=None):
    """An output that Snakemake's own report shows, with its caption of workflow/report/."""
    return report(
        path,
        caption=f"../report/{caption}.rst",
        category=category,
        subcategory=subcategory,
    )


# ---- inputs


def tune_inputs(wildcards):
    method = CONFIG.methods[wildcards.method]
    found = STEPS.model(wildcards.model) + STEPS.gate(wildcards.model)
    if CONFIG.datasets[method.data].format in PAIRS:
        found.append(f"{BASE}/cache/{wildcards.model}/{method.data}.safetensors")
    else:
        found += STEPS.data(method.data)
    if method.embeddings is not None:
        found.append(f"{BASE}/cache/{method.embeddings}/{method.data}.safetensors")
    return found + STEPS.rewards(wildcards.method, wildcards.model)


def kept_texts(wildcards):
    """Kept text conditions that a run or a row reads."""
    method = getattr(wildcards, "method", None)
    if method is None or reads_texts(CONFIG, CONFIG.methods[method]):
        return STEPS.texts(wildcards.model)
    return []


def models_of(base):
    return [name for name, entry in CONFIG.models.items() if entry.base == base]


def base_of(wildcards):
    """The repository of a base that is named in a path."""
    bases = {entry.base for entry in CONFIG.models.values()}
    return next(base for base in sorted(bases) if slug(base) == wildcards.base)


def text_data(wildcards):
    return sorted({name for name, _ in text_sets(CONFIG, base_of(wildcards))})


def image_jobs(wildcards, untuned=False):
    """Every run whose images a process makes: one model's of one task, all subjects; untuned: those without a LoRA."""
    found = jobs(CONFIG, wildcards.model, wildcards.task)
    return [job for job in found if job.method == UNTUNED or not untuned]


def image_sets(wildcards, untuned=False):
    return sorted({job.eval_set for job in image_jobs(wildcards, untuned)})


def subject_pictures(wildcards):
    """What scores of a subject's images are made from beside them."""
    subjects = [
        name
        for name in image_sets(wildcards)
        if CONFIG.datasets[name].format == "dreambooth"
    ]
    return STEPS.data(*subjects)


def untuned(what, task, model):
    """The record of a model's untuned rows: one of their own where other rows wait for training."""
    found = jobs(CONFIG, model, task)
    alone = any(job.method != UNTUNED for job in found)
    return str(manifest(model_dir(SCALE, task, model), what, untuned=alone))


def made_before(what):
    """Of generate and score: the untuned rows, where tuning waits for them; never two jobs on the same files."""

    def found(wildcards):
        shown = {(task, row.model) for task, row in calibrated(CONFIG)}
        if (
            CONFIG.scale_entry.hub != "fetched"
            or (wildcards.task, wildcards.model) not in shown
        ):
            return []
        path = untuned(what, wildcards.task, wildcards.model)
        own = str(manifest(model_dir(SCALE, wildcards.task, wildcards.model), what))
        return [path] if path != own else []

    return found


def lora_inputs(wildcards):
    found = {
        str(job.lora(SCALE)) for job in image_jobs(wildcards) if job.method != UNTUNED
    }
    return sorted(found)


def table_models(table):
    return sorted({row.model for row in CONFIG.table_entries[table].shown_rows})


def table_scores(table):
    return [
        f"{BASE}/{CONFIG.table_entries[table].task}/{model}/scores.json"
        for model in table_models(table)
    ]


def reference(*tables):
    """The paper's cells of those tables that it has."""
    return [str(path) for path in map(reference_file, tables) if path.exists()]


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

"""Which steps of the hub a job waits for: files that say that repositories are there. Torch-free look-ups.

In the stand-in hub a step trains what lies in one or more repositories: results/{scale}/hub/{step}.json. Elsewhere a
step is one repository, fetched or drawn at random: results/{scale}/hub/repositories/{owner}--{name}.json.
"""

from pathlib import Path

from pso.entries import UNTUNED, Checkpoint, Config, RepositoryEntry
from pso.hub import hub_dir, is_outside
from pso.imagefolder import METADATA
from pso.paths import RESULTS, texts_file
from pso.provenance import UserError
from pso.runs import jobs
from pso.runs import metrics as shown_metrics

HUB_STEPS = ("vae", "clip", "data", "style", "judges", "rewards", "teacher", "dmd2", "lcm", "turbo", "loras",
             "subjects", "likeness")  # fmt: skip
UNETS = {  # repository of a UNet -> the step that makes it
    "stabilityai/stable-diffusion-xl-base-1.0": "teacher",
    "tianweiy/DMD2": "dmd2",
    "latent-consistency/lcm-sdxl": "lcm",
    "stabilityai/sdxl-turbo": "turbo",
}
LORAS = {"tianweiy/DMD2": "loras", "latent-consistency/lcm-lora-sdxl": "loras"}
SCORERS = {  # repository of a scorer -> the step that makes it, where that is not `judges`
    "openai/clip-vit-base-patch32": "likeness",
    "facebook/dino-vits16": "likeness",
    "THUDM/ImageReward": "rewards",
    "xswu/HPSv2": "rewards",
}


def slug(repo: str) -> str:
    """owner/name as the name of a file."""
    return repo.replace("/", "--")


class Steps:
    """Files of steps, by what needs them."""

    def __init__(self, config: Config, results: Path = RESULTS):
        self.config, self.results, self.hub = config, results, hub_dir(config.scale, results)
        self.standin = config.scale_entry.standin
        self.published = {} if self.standin is None else self.standin.published

    def named(self, *steps: str) -> list[str]:
        return [f"{self.hub}/{step}.json" for step in steps]

    def repositories(self, *repos: str) -> list[str]:
        """Steps of a hub that is not the stand-in's; a folder of the user's own waits for none."""
        return [f"{self.hub}/repositories/{slug(repo)}.json" for repo in sorted(set(repos)) if not is_outside(repo)]

    def all(self) -> list[str]:
        """Every step of the hub: all of the stand-in's, elsewhere what the tables asked for need."""
        if self.standin is not None:
            return self.named(*HUB_STEPS, *(f"published_{name}" for name in self.published))
        return self.repositories(*needed(self.config))

    def model(self, model: str) -> list[str]:
        """Of a model's weights."""
        if self.standin is None:
            return self.repositories(*model_repositories(self.config, model))
        entry = self.config.models[model]
        published = {run.repo: f"published_{name}" for name, run in self.published.items()}
        parts = [*([entry.unet] if entry.unet else []), *entry.deltas]
        repos = [entry.base, *(part.repo for part in parts), *(d.minus for d in entry.deltas)]
        unets = {(UNETS | published)[repo] for repo in repos if repo in UNETS | published}
        loras = {(LORAS | published)[lora.repo] for lora in entry.loras if lora.repo in LORAS | published}
        return self.named(*sorted({"teacher"} | unets | loras))

    def base(self, base: str) -> list[str]:
        """Of a base model alone."""
        if self.standin is None:
            return self.repositories(base)
        return self.named(*sorted({"teacher", UNETS.get(base, "teacher")}))

    def texts(self, model: str) -> list[str]:
        """The kept text conditions of a model's prompts."""
        return [str(texts_file(self.config.scale, self.config.models[model].base, self.results))]

    def data(self, *datasets: str) -> list[str]:
        if self.standin is None:
            return self.repositories(*(self.config.datasets[name].repo for name in datasets))
        formats = {self.config.datasets[name].format for name in datasets}
        return self.named(*sorted({"subjects" if f == "dreambooth" else "data" for f in formats}))

    def scorers(self, *metrics: str) -> list[str]:
        """Of the checkpoints of metrics."""
        if self.standin is None:
            return self.repositories(*(repo for name in metrics for repo in metric_repositories(self.config, name)))
        checkpoints = [self.config.metrics[name].checkpoint for name in metrics]
        steps = {SCORERS.get(c.repo, "judges") for c in checkpoints if c is not None}
        tuned = steps & {"judges", "rewards"}  # from a CLIP of the step `clip`, or read with its tokenizer
        return self.named(*sorted(steps | ({"clip"} if tuned else set())))

    def rewards(self, method: str, model: str) -> list[str]:
        """Of a run's judges; a head for each model is made by a step of its own."""
        names = self.config.methods[method].metrics
        own = any(_made_for_models(self.config.metrics[name].head) for name in names)
        return self.scorers(*names) + (self.named(f"preference_model_{model}") if own else [])

    def gate(self, model: str) -> list[str]:
        """The verdict that a student of the stand-in hub draws what it is asked for; other models have no gate."""
        if self.standin is None:
            return []
        entry, gate = self.config.models[model], self.standin.gate
        gated = gate.steps in entry.grids and (entry.tuned_steps == gate.steps or entry.loras)
        return self.named(f"gate_{model}") if gated else []

    def pairs(self, dataset: str) -> list[str]:
        """What a set of pairs is made from: a step of the hub, or the files of a folder of the user's own."""
        entry = self.config.datasets[dataset]
        if is_outside(entry.repo):
            if entry.format != "imagefolder":
                return sorted(map(str, Path(entry.repo).glob(entry.files)))
            folder = Path(entry.repo) / entry.files
            return sorted({str(folder / METADATA), *(str(path) for path in folder.rglob("*") if path.is_file())})
        if entry.format == "imagefolder" and self.standin is not None:
            return self.named("style")
        return self.data(dataset)

    def shown(self) -> list[str]:
        """Of models that tables asked for show: their gates and preference models."""
        shown = sorted({(job.model, job.method) for job in jobs(self.config)})
        gates = [path for model, _ in shown for path in self.gate(model)]
        heads = [path for model, method in shown if method != UNTUNED for path in self.rewards(method, model)]
        return sorted({*gates, *heads})


def _made_for_models(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and "{model}" in (checkpoint.file or "")


# ---- repositories by what needs them ----


def model_repositories(config: Config, model: str) -> list[str]:
    entry = config.models[model]
    found = [entry.base, entry.vae, entry.preview_vae, entry.unet and entry.unet.repo]
    found += [lora.repo for lora in entry.loras]
    found += [repo for delta in entry.deltas for repo in (delta.repo, delta.minus)]
    return sorted({repo for repo in found if repo})


def metric_repositories(config: Config, metric: str) -> list[str]:
    """What is fetched for a metric; a head that the workflow trains is not."""
    parts = [part for part in config.metrics[metric].checkpoints.values() if not _made_for_models(part)]
    return sorted({repo for part in parts for repo in (part.repo, part.processor) if repo})


def original(config: Config, repo: str) -> str:
    """The repository of which one is a mirror; itself, where it has an entry of its own or none at all."""
    if repo in config.repositories:
        return repo
    return next((name for name, entry in config.repositories.items() if repo in entry.mirrors), repo)


def published_entry(config: Config, repo: str) -> RepositoryEntry:
    """The repository's own entry, or that of the repository of which it is a mirror: the same files at a commit of
    its own."""
    if repo in config.repositories:
        return config.repositories[repo]
    if (entry := config.repositories.get(original(config, repo))) is not None:
        return entry.model_copy(update={"revision": None, "gone": None, "mirrors": []})
    raise UserError(
        f"repository {repo} has no entry in repositories.yaml and is nobody's mirror there; add an entry with its "
        "files, size_gb and licence, or its name to the mirrors of the repository whose files it has."
    )


def needed(config: Config) -> dict[str, list[str]]:
    """Repository -> what needs it ("model sdxl_dmd2", "metric pick_score", "data pickapic_v2"), for the tables asked
    for. Folders of the user's own are left out."""
    found: dict[str, list[str]] = {}
    for what, repo in _needs(config):
        if not is_outside(repo):
            found.setdefault(repo, []).append(what)
    return dict(sorted(found.items()))


def own_folders(config: Config) -> list[str]:
    """Data sets that the tables asked for read from a folder of the user's own."""
    return [what.removeprefix("data ") for what, repo in _needs(config) if is_outside(repo)]


def _needs(config: Config) -> list[tuple[str, str]]:
    """What needs which repository or folder."""
    wanted = jobs(config)
    models = sorted({job.model for job in wanted})
    methods = sorted({job.method for job in wanted} - {UNTUNED})
    roots = sorted({config.table_entries[name].task for name in config.tables})
    judges = {m for task in roots for m in shown_metrics(config, task)}
    judges |= {m for name in methods for m in config.methods[name].metrics}
    judges |= {e for name in methods if (e := config.methods[name].embeddings) is not None}
    data = {job.eval_set for job in wanted} | {config.methods[name].data for name in methods}
    if config.scale_entry.preference_model and any(
        _made_for_models(config.metrics[m].head) for name in methods for m in config.methods[name].metrics
    ):
        data.add(config.scale_entry.preference_model.data)
    needs = [(f"model {name}", repo) for name in models for repo in model_repositories(config, name)]
    needs += [(f"metric {name}", repo) for name in sorted(judges) for repo in metric_repositories(config, name)]
    return [*needs, *((f"data {name}", config.datasets[name].repo) for name in sorted(data))]

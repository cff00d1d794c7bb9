"""Every job of a campaign that costs something, with its calls of networks: from the configuration alone. Torch-free.

Tuning runs are counted by pso/work.py, images as the padded batches of eval/generate.py, caches as the pairs that runs
visit. pso/estimate.py makes FLOPs, hours and bytes of them.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pso import work
from pso.checks import PAIRS
from pso.entries import UNTUNED, Config
from pso.paths import root_of
from pso.runs import Job, jobs, metrics, not_comparable
from pso.steps import needed, original, published_entry, slug
from pso.visits import bases, text_sets
from pso.work import Call, Calls, Tuning

# Pick-a-Pic v2 without ties, by Diffusion-DPO's appendix: what pso/data.py finds and checks.
PICKAPIC_ROWS, PICKAPIC_PAIRS, PICKAPIC_PROMPTS = 959_040, 851_293, 58_960
STYLE_PICTURES = 833  # Appendix B.2
SUBJECT_PROMPTS = 25  # of a DreamBooth subject
HELD_OUT = 0.1  # of the preference model's pairs (baselines/preference_training.py)

JUDGES = {  # repository of a metric's checkpoint -> the network that looks at a picture
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip_h14",
    "yuvalkirstain/PickScore_v1": "clip_h14",
    "xswu/HPSv2": "clip_h14",
    "openai/clip-vit-large-patch14": "clip_l14",
    "openai/clip-vit-base-patch32": "clip_b32",
    "THUDM/ImageReward": "image_reward",
    "facebook/dino-vits16": "dino",
}


@dataclass(frozen=True)
class Work:
    """One job of the workflow: calls by part ("training", "probes", ...), images kept, bytes by what they are."""

    rule: str
    name: str
    parts: dict[str, Calls]
    images: int = 0
    samples: int = 0  # pairs that a cache holds
    prompts: int = 0  # texts that a cache holds
    side: int = 0
    lora_rank: int = 0
    gb: float = 0.0  # fetched
    second_pass: Calls = field(default_factory=Counter)  # if an update's rows do not fit at once; in no sum
    one_transition: Calls | None = None  # training, if one random transition stood for the sum; in no sum
    without_cache: Calls = field(default_factory=Counter)  # encoding anew for every update and image; in no sum
    uncounted: str | None = None  # why its calls are not known


# ---- data ----


def pairs_and_prompts(config: Config, dataset: str) -> tuple[int, int]:
    """Samples and different prompts of a set of pairs or of captioned pictures."""
    entry, scale = config.datasets[dataset], config.scale_entry
    if entry.format == "imagefolder":
        count = entry.num_rows or (scale.standin.num_style_pictures if scale.standin else STYLE_PICTURES)
        return count, count
    made = scale.standin or scale.random
    if made is not None:
        return made.num_pairs, made.num_pairs
    if entry.num_rows in (None, PICKAPIC_ROWS):
        return PICKAPIC_PAIRS, PICKAPIC_PROMPTS
    return entry.num_rows, entry.num_rows


def num_prompts(config: Config, dataset: str) -> int:
    """Prompts of a prompt set, or of one subject."""
    entry, scale = config.datasets[dataset], config.scale_entry
    if entry.format == "dreambooth":
        return SUBJECT_PROMPTS
    if entry.format in PAIRS:
        return pairs_and_prompts(config, dataset)[1]
    if entry.num_rows is not None:
        return entry.num_rows
    made = {} if scale.standin is None else scale.standin.num_prompts
    listed = next((count for name, count in made.items() if dataset.startswith(name)), None)
    return listed or (scale.random.num_prompts if scale.random else 500)


def judge(config: Config, metric: str | None) -> Call | None:
    """The network that looks at a picture, if a metric has one that is known here."""
    checkpoint = None if metric is None else config.metrics[metric].checkpoint
    network = None if checkpoint is None else JUDGES.get(original(config, checkpoint.repo))
    return None if network is None else Call(network)


def unknown_judges(config: Config) -> list[str]:
    """Metrics of the tables asked for that read a checkpoint whose network is not known here."""
    asked = {need.removeprefix("metric ") for needs in needed(config).values() for need in needs}
    found = {name: entry.checkpoint for name, entry in config.metrics.items() if name in asked}
    return sorted(name for name, part in found.items() if part is not None and judge(config, name) is None)


# ---- the jobs of a campaign ----


@dataclass(frozen=True, order=True)
class Run:
    """What one tuning job makes."""

    task: str
    model: str
    method: str
    seed: int


def runs(config: Config) -> list[Run]:
    return sorted({Run(j.task, j.model, j.method, j.seed) for j in jobs(config) if j.method != UNTUNED})


def works(config: Config, kept: float = work.KEPT) -> list[Work]:
    """Every job behind the tables of the config that costs something."""
    return [
        *_fetched(config),
        *_caches(config, runs(config)),
        *_texts(config),
        *_embeddings(config, runs(config)),
        *_preference_models(config),
        *(tune_work(config, run, kept) for run in runs(config)),
        *_evaluated(config),
    ]


def _fetched(config: Config) -> Iterator[Work]:
    if config.scale_entry.hub == "fetched":
        for repo in needed(config):
            yield Work("fetch", repo, {}, gb=published_entry(config, repo).size_gb)


def judged_by_own_model(config: Config, method: str) -> bool:
    """Whether a method's judge is trained by the workflow for each model."""
    heads = [config.metrics[name].head for name in config.methods[method].metrics]
    return any(head is not None and "{model}" in (head.file or "") for head in heads)


def visited(config: Config, found: list[Run], model: str, dataset: str, by_judges: bool = True) -> int:
    """Pairs of a set that the runs on a model see, and their judge's training if `by_judges`.

    With one seed runs see the same ones in the same order; orders of several seeds, and the beginning of the set, meet
    by chance, and what they have in common is kept once: the expected number.
    """
    by_seed: dict[int, int] = {}
    for run in found:
        method = config.methods[run.method]
        if (run.model, method.data) == (model, dataset):
            by_seed[run.seed] = max(by_seed.get(run.seed, 0), method.tune.num_updates * method.tune.batch_size)
    first = 0
    if by_judges and any(run.model == model and judged_by_own_model(config, run.method) for run in found):
        fit = config.scale_entry.preference_model
        first = fit.num_pairs if fit and fit.data == dataset else 0
    count, _ = pairs_and_prompts(config, dataset)
    return round(count * (1 - math.prod(1 - min(n, count) / count for n in (*by_seed.values(), first))))


def _caches(config: Config, found: list[Run]) -> Iterator[Work]:
    sets = [name for name, entry in config.datasets.items() if entry.format in PAIRS]
    for model, dataset in [(m, d) for m in sorted({run.model for run in found}) for d in sets]:
        entry, count = config.models[model], visited(config, found, model, dataset)
        if not count:
            continue
        prompts = min(count, pairs_and_prompts(config, dataset)[1])
        calls = Counter({Call("encode", entry.resolution): 2 * count, Call("text"): prompts})
        if config.datasets[dataset].format == "imagefolder":  # each picture against a sample of the untuned model
            guided = 2 if entry.guidance_scale > 1 else 1
            calls[Call("unet", entry.resolution)] += count * entry.tuned_steps * guided
            calls[Call("decode", entry.resolution)] += count
        name = f"{model} {dataset}"
        yield Work("latents", name, {"latents": calls}, samples=count, prompts=prompts, side=entry.resolution)


def _texts(config: Config) -> Iterator[Work]:
    """Different prompts of every set, and the empty one. A subject's own prompt is one more."""
    for base in bases(config):
        sets = text_sets(config, base)
        count = 1 + sum(num_prompts(config, name) + bool(subject) for name, subject in sets)
        yield Work("texts", slug(base), {"texts": Counter({Call("text"): count})}, prompts=count)


def _embeddings(config: Config, found: list[Run]) -> Iterator[Work]:
    asked: dict[tuple[str, str], set[str]] = {}
    for run in found:
        method = config.methods[run.method]
        if method.embeddings is not None:
            asked.setdefault((method.embeddings, method.data), set()).add(run.model)
    for (metric, dataset), models in sorted(asked.items()):
        count = max(visited(config, found, model, dataset, by_judges=False) for model in models)
        calls = Counter({Call("clip_h14_text"): min(count, pairs_and_prompts(config, dataset)[1])})
        if (network := judge(config, metric)) is not None:
            calls[network] += 2 * count
        yield Work("embeddings", f"{metric} {dataset}", {"embeddings": calls})


def _preference_models(config: Config) -> Iterator[Work]:
    """Predictions of both pictures of a pair at the times between forks; then its own training, whose backward pass
    through CLIP is counted as two forward ones, which is at most what it is."""
    fit = config.scale_entry.preference_model
    for model in sorted({run.model for run in runs(config) if judged_by_own_model(config, run.method)}):
        entry = config.models[model]
        pairs, times = min(fit.num_pairs, pairs_and_prompts(config, fit.data)[0]), max(entry.tuned_steps - 2, 0)
        calls = Counter({Call("unet", entry.resolution): 2 * times * pairs})
        calls[Call("decode", entry.resolution)] += 2 * (1 + times) * pairs
        learnt = 3 * 2 * fit.num_steps * fit.batch_size + round(2 * 2 * times * HELD_OUT * pairs)
        calls[Call("clip_h14")] += 2 * pairs + learnt
        calls[Call("clip_h14_text")] += pairs
        yield Work("preference_model", model, {"preference model": calls})


def tuning(config: Config, run: Run, kept: float = work.KEPT) -> Tuning:
    method = config.methods[run.method]
    tune = method.tune
    named = [*tune.probe_metrics, *([tune.probe_reward] if tune.probe_reward else [])]
    dreambooth = config.datasets[method.data].format == "dreambooth"
    prompts = 1 if dreambooth else num_prompts(config, method.data)
    probed = tuple(judge(config, name) for name in named)
    return Tuning(config.models[run.model], method, prompts, judge(config, method.reward), probed, kept)


def tune_work(config: Config, run: Run, kept: float = work.KEPT) -> Work:
    """One run, whether a table asks for it or not."""
    name = f"{run.task} {run.model} {run.method} seed{run.seed}"
    told, method, rank = tuning(config, run, kept), config.methods[run.method], config.models[run.model].lora_rank
    known = work.declared(method.module)
    if known.get("SOURCE") not in work.SOURCES or "NEEDS_PRE" not in known:
        return Work("tune", name, {}, lora_rank=rank, uncounted=f"SOURCE {known.get('SOURCE')!r} is not one of ours")
    source, parts = work.SOURCES[known["SOURCE"]], work.tuned(told)
    anew = Counter({Call("text"): told.pairs if told.prompts > 1 else 0})
    if config.datasets[method.data].format in PAIRS:
        given = 1 if known["SOURCE"] in ("Targets", "TargetsAgainstModel") else 2
        anew[Call("encode", told.model.resolution)] = given * told.pairs
    steps = work.transitions(told, source)
    one = work.training(told, source, 1) if steps > 1 and not source.reverse else None
    second = Counter({told.theta: parts["training"][told.theta]})
    return Work("tune", name, parts, lora_rank=rank, second_pass=second, one_transition=one, without_cache=anew)


def images_of(config: Config, job: Job) -> int:
    return num_prompts(config, job.eval_set) * config.datasets[job.eval_set].num_seeds


def drawn(config: Config, job: Job) -> Calls:
    """A job's images, in batches of a fixed shape: the last one is padded."""
    entry, batch = config.models[job.model], config.scale_entry.eval_batch
    count = math.ceil(images_of(config, job) / batch) * batch
    unet = Call("unet", entry.resolution)
    if job.method != UNTUNED:
        unet = Call("theta", entry.resolution, entry.lora_rank)
    guided = 2 if entry.guidance_scale > 1 else 1
    return Counter({unet: count * job.steps * guided, Call("decode", entry.resolution): count})


def scored(config: Config, job: Job, shown: set[Job]) -> Calls:
    """Every metric has a network of its own; drift also looks at the untuned picture."""
    found, count = Counter(), images_of(config, job)
    for name in metrics(config, root_of(job.task)):
        network = judge(config, name)
        if network is not None and not not_comparable(config, name, job, shown):
            twice = config.metrics[name].compared_with == "untuned" and job.method != UNTUNED
            found[network] += 2 * count if twice else count
    return found


def _evaluated(config: Config) -> Iterator[Work]:
    """One process for each model and task draws, another scores; texts are read once in it."""
    wanted = jobs(config)
    for root, model in sorted({(root_of(job.task), job.model) for job in wanted}):
        these = [job for job in wanted if (root_of(job.task), job.model) == (root, model)]
        images, name = sum(images_of(config, job) for job in these), f"{root} {model}"
        made = sum((drawn(config, job) for job in these), Counter())
        side = config.models[model].resolution
        anew = Counter({Call("text"): sum(n for call, n in made.items() if call.network == "decode")})
        yield Work("generate", name, {"images": made}, images=images, side=side, without_cache=anew)
        seen = sum((scored(config, job, set(these)) for job in these), Counter())
        readers = [m for m in metrics(config, root) if judge(config, m) == Call("clip_h14")]
        texts = sum(num_prompts(config, eval_set) for eval_set in {job.eval_set for job in these})
        yield Work("score", name, {"scores": seen + Counter({Call("clip_h14_text"): len(readers) * texts})})

"""What a job of the workflow asks a cluster for: minutes and MB of host memory. From the configuration; torch-free.

At the published sizes a job's seconds are the FLOPs of pso/campaign.py at the utilisation of pso/estimate.py, with
loading, reading and what each picture costs outside the networks. Other scales have constants measured on the
miniature (results/miniature/cost.md). A limit is SAFETY times the expected seconds, and grows with the attempt.
Memory is the host's, not the GPU's.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import yaml

from pso import campaign
from pso.campaign import Run, Work
from pso.entries import UNTUNED, Config
from pso.estimate import FIGURES, Flops, all_calls, counts, kept_name, rate
from pso.hub import is_outside
from pso.leakage import data_sets
from pso.provenance import ROOT, UserError
from pso.runs import jobs, metrics
from pso.steps import metric_repositories, model_repositories, published_entry, slug
from pso.visits import bases
from pso.work import Call

# ---- the published sizes. Stated, unless it says measured ----

PARTITIONS = ROOT / "workflow" / "profiles" / "slurm" / "partitions.yaml"
SAFETY = 2.0
START_S = 300.0  # imports, CUDA, building the networks
READ_GB_S = 0.1  # weights and data from a shared disk, and their sha256
FETCH_GB_S = 0.03  # a download, or weights drawn at random
UPDATE_S = 0.2  # of an update, outside the networks: noise by key, optimiser, log, its share of checkpoints
PICTURE_S = {  # of a picture of 1024 x 1024 px; a VAE that is not compiled takes 0.07 s more than its FLOPs say
    "latents": 0.15,  # and a JPEG's decoding
    "preference_model": 0.12,
    "tune": 0.12,  # and the judge's transform
    "generate": 0.6,  # a PNG takes 0.15 to 0.56 s of one core (measured on smooth and noisy pictures)
    "score": 0.5,  # every judge's transform, sharpness and spectrum
    "embeddings": 0.05,
}
HOST_MB = 6_000  # Python, torch, CUDA's context
DATA_MB = 4_000  # pictures of a row group, decoded
HELD = 2.0  # times its files: compositions are added up in float32, and a file is mapped while it is cast
OWN_GB = 10.0  # weights of the user's own, whose size no entry tells
UNCOUNTED_S = 24 * 3600.0  # a method with a SOURCE of the user's own; an hour at other sizes
LIGHT = ("table", "diff", "judge", "draw", "sum_up", "report_page", "cards", "leakage", "calibrate", "calibrate_model")
LIGHT_S, LIGHT_MB = 600.0, 4_000  # of these, which are torch-free; the memory also of fetch
VERIFY_S, VERIFY_MB = 1800.0, 16_000  # of verify_scorers, which is the same at every scale: measured 10 minutes
UPPER = {  # FLOPs at 1024 px where no figure is kept: another size or rank
    "unet": 6.8e12, "theta": 7.0e12, "backward": 8.1e12, "decode": 10.5e12, "encode": 4.9e12,
}  # fmt: skip
JUDGE_FLOPS = 1e12  # at most, of a network that is not in UPPER

# ---- every other size: measured on two idle cores, with others' slower ones in mind ----

SMALL_SAFETY = 5.0
SMALL_START_S = 30.0  # images and scores of a handful of pictures take 6 to 10 s
SMALL_FORWARD_S = 0.003  # 2025 s of tuning for 705,480 forwards, loading included
SMALL_HUB_S = 380.0  # of a rule hub_*: the teacher takes longest
SMALL_MB, SMALL_HUB_MB = 2_000, 4_000  # at most 1.12 and 2.39 GiB


class KeptFlops(Flops):
    """Kept FLOPs, whatever libraries they were counted with: a limit needs no more, and torch is not loaded."""

    def __init__(self, path: Path = FIGURES):
        try:
            self.kept = json.loads(Path(path).read_text())["flops"]
        except (OSError, ValueError, KeyError):  # results/ was cleared
            self.kept = {}

    def of(self, call: Call) -> float:
        if (found := self.kept.get(kept_name(call))) is not None:
            return found
        if call.network not in UPPER:
            return JUDGE_FLOPS
        share = call.side / 1024
        return UPPER[call.network] * share ** (2 if share < 1 else 3)  # above, attention grows with the fourth power


def published_sizes(config: Config) -> bool:
    made = config.scale_entry
    return made.standin is None and (made.random is None or made.random.sizes == "published")


class Needs:
    """Of the rules of the workflow and their jobs, which are named as in pso/campaign.py. Counted once, when asked."""

    def __init__(self, config: Config):
        self.config, self.full = config, published_sizes(config)

    @functools.cached_property
    def works(self) -> dict[tuple[str, str], Work]:
        return {(item.rule, item.name): item for item in campaign.works(self.config)}

    @functools.cached_property
    def flops(self) -> KeptFlops:
        return KeptFlops()

    @functools.cached_property
    def speed(self):
        return rate()

    def minutes(self, rule: str, job: str = "", attempt: int = 1) -> int:
        """The limit of a job, at most what a cluster allows: what is stopped there goes on in the next attempt."""
        safety = SAFETY if self.full else SMALL_SAFETY
        return min(max(10, math.ceil(safety * self.seconds(rule, job) / 60)) * attempt, self.longest)

    @functools.cached_property
    def longest(self) -> int:
        """The longest max_runtime of the partitions in the profile for SLURM, in minutes."""
        from snakemake_executor_plugin_slurm.utils import parse_time_to_minutes  # half a second

        partitions = yaml.safe_load(PARTITIONS.read_text())["partitions"].values()
        return max(parse_time_to_minutes(limits["max_runtime"]) for limits in partitions)

    def mem_mb(self, rule: str, job: str = "", attempt: int = 1) -> int:
        """Host memory of a job."""
        if rule in LIGHT or rule in ("fetch", "verify_scorers"):
            found = VERIFY_MB if rule == "verify_scorers" else LIGHT_MB
        elif self.full:
            found = HOST_MB + 1000 * HELD * self._gb(self._weights(rule, job)) + self._data_mb(rule, job)
        else:
            found = SMALL_HUB_MB if rule.startswith("hub_") else SMALL_MB
        return math.ceil(found) * attempt

    def seconds(self, rule: str, job: str = "") -> float:
        """What a job is expected to take."""
        if rule == "verify_scorers":
            return VERIFY_S
        if rule in LIGHT:
            return LIGHT_S + self._gb(self._data(rule, job)) / READ_GB_S
        item = self.work(rule, job)
        if item.uncounted:
            return UNCOUNTED_S if self.full else UNCOUNTED_S / 24
        if not self.full:
            return self._small(rule, item)
        if rule in ("fetch", "draw_weights"):
            return START_S + self._gb([job]) / FETCH_GB_S
        read = self._gb([*self._weights(rule, job), *self._data(rule, job)]) / READ_GB_S
        updates = UPDATE_S * self._updates(job) if rule == "tune" else 0
        networks = self.speed.hours(self.flops.total(all_calls([item]))) * 3600
        return START_S + read + networks + updates + self.pictures_s(rule, item)

    def _small(self, rule: str, item: Work) -> float:
        if rule.startswith("hub_"):
            return SMALL_HUB_S
        found = counts(all_calls([item]))
        return SMALL_START_S + SMALL_FORWARD_S * sum(found[kind] for kind in ("pre", "theta", "backward"))

    def pictures_s(self, rule: str, item: Work) -> float:
        """Seconds for pictures outside the networks."""
        each = PICTURE_S.get(rule.removesuffix("_untuned"), 0)
        if item.images:
            return each * item.images * (item.side / 1024) ** 2
        calls = all_calls([item])
        if rule == "embeddings":
            return each * counts(calls)["scored"]
        coded = [call for call in calls if call.network in ("decode", "encode")]
        return each * sum(calls[call] * (call.side / 1024) ** 2 for call in coded)

    # ---- a job by its name ----

    def work(self, rule: str, job: str) -> Work:
        """Its calls and pictures; also of a run that no table asks for."""
        if rule.endswith("_untuned") or rule == "score":
            return self._evaluated(rule, *job.split())
        if (found := self.works.get((rule, job))) is not None:
            return found
        if rule == "tune":
            task, model, method, seed = job.split()
            return campaign.tune_work(self.config, Run(task, model, method, int(seed.removeprefix("seed"))))
        return Work(rule, job, {})

    def _evaluated(self, rule: str, task: str, model: str) -> Work:
        """Of score, which campaign counts without its pictures, and of what makes and scores untuned rows alone."""
        these = jobs(self.config, model, task)
        if rule.endswith("_untuned"):
            these = [job for job in these if job.method == UNTUNED]
        images = sum(campaign.images_of(self.config, job) for job in these)
        side = self.config.models[model].resolution
        one = campaign.scored if rule.startswith("score") else campaign.drawn
        more = (set(these),) if rule.startswith("score") else ()
        calls = sum((one(self.config, job, *more) for job in these), Counter())
        return Work(rule, f"{task} {model}", {"images": calls}, images=images, side=side)

    def _updates(self, job: str) -> int:
        return self.config.methods[job.split()[2]].tune.num_updates

    # ---- files ----

    def _weights(self, rule: str, job: str) -> list[str]:
        """Repositories whose networks a job loads; more than that, where it loads a part."""
        config, names = self.config, job.split()
        if rule in ("generate", "generate_untuned"):
            return model_repositories(config, names[1])
        if rule in ("score", "score_untuned"):
            return [repo for name in metrics(config, names[0]) for repo in self._judge(name)]
        if rule == "tune":
            judges = [repo for name in config.methods[names[2]].metrics for repo in self._judge(name)]
            return model_repositories(config, names[1]) + judges
        if rule == "draw_weights":
            return [job]
        if rule == "latents":
            return model_repositories(config, names[0])
        if rule == "texts":
            return [base for base in bases(config) if slug(base) == job]
        if rule == "preference_model":
            return model_repositories(config, names[0]) + self._judge("spm_lite")
        return self._judge(names[0]) if rule == "embeddings" else []

    def _judge(self, metric: str) -> list[str]:
        """Where a metric's networks lie; of a repository that is only its processor's little is read."""
        own = {part.repo for part in self.config.metrics[metric].checkpoints.values()}
        return [repo for repo in metric_repositories(self.config, metric) if repo in own]

    def _data(self, rule: str, job: str) -> list[str]:
        """Repositories of pictures that a job reads as a whole, where they have their published size."""
        if self.config.scale_entry.hub != "fetched":
            return []
        if rule in ("latents", "embeddings"):
            return [self.config.datasets[job.split()[1]].repo]
        if rule == "leakage":
            return [self.config.datasets[name].repo for name in data_sets(self.config)[0]]
        return []

    def _gb(self, repos: list[str]) -> float:
        return sum(self._size(repo) for repo in set(repos))

    def _size(self, repo: str) -> float:
        try:
            return OWN_GB if is_outside(repo) else published_entry(self.config, repo).size_gb
        except UserError:
            return OWN_GB

    def _data_mb(self, rule: str, job: str) -> float:
        """Data in memory: pictures on their way, embeddings of a run's pairs. Latents and text conditions stay in their
        files."""
        if rule != "tune":
            return DATA_MB
        _, model, method, _ = job.split()
        entry, found = self.config.methods[method], DATA_MB
        if entry.embeddings is not None:
            item = self.works.get(("embeddings", f"{entry.embeddings} {entry.data}"))
            found += counts(all_calls([item]))["scored"] * 1024 * 2 / 1e6 if item else 0
        return found

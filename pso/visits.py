"""Which samples a run visits, in which order, and what the runs that share a set of pairs visit together. Torch-free.

A run with one seed visits the samples in one endless order. Of a set as large as Pick-a-Pic only what is visited is
read, encoded and kept.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pso.checks import PAIRS
from pso.entries import UNTUNED, Config, MethodEntry
from pso.provenance import UserError
from pso.runs import jobs


def pair_indices(update: int, batch_size: int, num_pairs: int, seed: int, left_out: tuple[int, ...] = ()) -> list[int]:
    """The samples of one update: a slice of an endless order that visits each sample once per epoch.

    In place of those left out (their pictures could not be used) come the next ones in the order.
    """
    usable = num_pairs - len(left_out)
    if usable < 1 or batch_size < 1 or update < 0:
        raise UserError(
            f"update {update} of {batch_size} out of {usable} samples cannot be drawn; "
            "expected at least one sample and a batch of at least one: check the data set and tune.batch_size."
        )
    positions = range(update * batch_size, (update + 1) * batch_size)
    return [int(_order(p // usable, num_pairs, seed, left_out)[p % usable]) for p in positions]


@functools.lru_cache(maxsize=4)
def _order(epoch: int, count: int, seed: int, left_out: tuple[int, ...]) -> np.ndarray:
    # numpy promises the same raw bits in every version, but not the same Generator.permutation
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(count)
    order = np.argsort(bits, kind="stable")
    return order[~np.isin(order, left_out)] if left_out else order


def probed(shown: int, count: int) -> list[int]:
    """Which of the prompts a run is probed on, spread over all of them."""
    shown = min(shown, count)
    return [i * count // shown for i in range(shown)]


# ---- what several runs visit together ----


@dataclass(frozen=True)
class Plan:
    """What is kept of a large set of pairs. `first`: so many pairs from the beginning of the set."""

    visits: dict[int, int] = field(default_factory=dict)  # seed -> samples visited
    first: int = 0
    probe_prompts: list[int] = field(default_factory=list)  # prompts probed, of each method
    all_texts: bool = False  # a method samples from the prompts alone


def latents_plan(config: Config, model: str, dataset: str) -> Plan | None:
    """Of all methods that the tables train this model with on this data. None: everything, as of sets made small."""
    runs = [method for name, method in trained(config) if name == model]
    fit, judges = config.scale_entry.preference_model, [config.metrics[name] for m in runs for name in m.metrics]
    own_judge = any(judge.head is not None and "{model}" in (judge.head.file or "") for judge in judges)
    first = fit.num_pairs if fit is not None and fit.data == dataset and own_judge else 0
    methods = [method for method in runs if method.data == dataset]
    return _plan(config, methods, first)


def embeddings_plan(config: Config, metric: str, dataset: str) -> Plan | None:
    """Of all methods of the tables that compare pairs of this data by this metric's CLIP."""
    methods = [method for _, method in trained(config) if (method.embeddings, method.data) == (metric, dataset)]
    return _plan(config, methods)


def trained(config: Config) -> list[tuple[str, MethodEntry]]:
    """(model, method) of every run of the tables asked for, and of those that the scale has by default."""
    every = sorted({*config.tables, *(config.scale_entry.default_tables or [])})
    shown = jobs(config.model_copy(update={"tables": every}))
    names = sorted({(job.model, job.method) for job in shown if job.method != UNTUNED})
    return [(model, config.methods[method]) for model, method in names]


def _plan(config: Config, methods: list[MethodEntry], first: int = 0) -> Plan | None:
    if config.scale_entry.hub != "fetched":
        return None
    paired = [method for method in methods if method.reward is None]  # the others rank samples of their own
    most = max((method.tune.num_updates * method.tune.batch_size for method in paired), default=0)
    return Plan(
        visits={seed: most for seed in config.seeds if most},
        first=first,
        probe_prompts=sorted({method.tune.probe_prompts for method in methods}),
        all_texts=len(paired) < len(methods),
    )


def kept_pairs(plan: Plan | None, num_pairs: int, left_out: Iterable[int]) -> np.ndarray:
    """Which pairs [num_pairs] bool a plan asks for."""
    left_out = tuple(sorted(left_out))
    usable = np.ones(num_pairs, bool)
    usable[list(left_out)] = False
    if plan is None or any(count >= usable.sum() for count in plan.visits.values()):
        return usable
    kept = np.zeros(num_pairs, bool)
    for seed, count in plan.visits.items():
        kept[_order(0, num_pairs, seed, left_out)[:count]] = True
    kept[np.flatnonzero(usable)[: plan.first]] = True
    return kept


def kept_prompts(plan: Plan | None, pairs: np.ndarray, prompt_index: np.ndarray, num_prompts: int) -> np.ndarray:
    """Which prompts [num_prompts] bool are asked for beside those of the kept pairs [P] bool."""
    kept = np.zeros(num_prompts, bool)
    kept[prompt_index[pairs]] = True
    if plan is None or plan.all_texts:
        kept[:] = True
    else:
        kept[[i for shown in plan.probe_prompts for i in probed(shown, num_prompts)]] = True
    return kept


# ---- texts: those of prompt sets and subjects, for all models of one base ----


def reads_texts(config: Config, method: MethodEntry) -> bool:
    """Whether a run takes text conditions of pso/texts.py. The captions of pairs lie with their latents, the empty one,
    which methods that drop captions need, does not."""
    return config.datasets[method.data].format not in PAIRS or method.objective.get("caption_dropout", 0) > 0


def bases(config: Config) -> list[str]:
    """Repositories of the base models behind the tables asked for."""
    return sorted({config.models[job.model].base for job in jobs(config)})


def text_sets(config: Config, base: str) -> list[tuple[str, str]]:
    """(data set, its subject or "") of all prompts that the tables' jobs on models of a base read: evaluation sets, and
    what runs train on beside pairs."""
    found = set()
    for job in (job for job in jobs(config) if config.models[job.model].base == base):
        sets = [job.eval_set] + ([config.methods[job.method].data] if job.method != UNTUNED else [])
        for name in (name for name in sets if config.datasets[name].format not in PAIRS):
            found.add((name, job.subject or "" if config.datasets[name].format == "dreambooth" else ""))
    return sorted(found)

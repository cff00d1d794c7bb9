"""How often a tuning run calls each network: counted from its settings alone, before it runs. Torch-free.

The counts follow from what the code does: the method's SOURCE (pso/sources.py, pso/stepwise.py), NEEDS_PRE and
transitions, one pass of an update's rows (pso/tune.py), guidance as two calls, and probes (pso/probe.py).
"""

import ast
import functools
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pso.checks import SCHEMA_DIR, STOCHASTIC
from pso.entries import MethodEntry, ModelEntry

KEPT = 0.3  # share of SPO's forks above its threshold: known only afterwards; methods.yaml, spo_adapted


class Call(NamedTuple):
    """A call of a network for one sample.

    unet: the frozen UNet; theta, backward: the same with a LoRA of `rank`; decode, encode: the VAE; text: both text
    encoders on a prompt; judges by name, clip_h14_text on a prompt. `side`: of the pictures, px.
    """

    network: str
    side: int = 0
    rank: int = 0


Calls = Counter[Call]


@functools.cache
def declared(module: str) -> dict[str, Any]:
    """The literal constants at the top of a method's file: SOURCE and NEEDS_PRE. Nothing is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    found = {}
    if spec is not None and spec.origin and spec.origin.endswith(".py"):
        for node in ast.parse(Path(spec.origin).read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                found |= {ast.unparse(name): node.value.value for name in node.targets}
    return found


def settings(method: MethodEntry) -> dict[str, Any]:
    """Its objective with the defaults of its module's schema, where it has one."""
    path = SCHEMA_DIR / "methods" / f"{method.module}.json"
    properties = json.loads(path.read_text())["properties"] if path.exists() else {}
    return {k: v["default"] for k, v in properties.items() if "default" in v} | method.objective


@dataclass(frozen=True)
class Tuning:
    """What the counts of one run depend on."""

    model: ModelEntry
    method: MethodEntry
    prompts: int
    reward: Call | None = None
    probed: tuple[Call | None, ...] = ()  # networks of the probe's judges; None: one without a network
    kept: float = KEPT

    @property
    def steps(self) -> int:
        return self.model.tuned_steps

    @property
    def guided(self) -> int:
        """Calls of the network in a step of the sampler."""
        return 2 if self.model.guidance_scale > 1 else 1

    @property
    def pairs(self) -> int:
        """Samples that all updates see together."""
        return self.method.tune.num_updates * self.method.tune.batch_size

    @property
    def objective(self) -> dict[str, Any]:
        return settings(self.method)

    @property
    def unet(self) -> Call:
        return Call("unet", self.model.resolution)

    @property
    def theta(self) -> Call:
        return Call("theta", self.model.resolution, self.model.lora_rank)

    def sampled(self, trajectories: int, steps: int) -> Calls:
        return Counter({self.theta: trajectories * steps * self.guided})

    def judged(self, pictures: int) -> Calls:
        """Pictures decoded and ranked; each prompt of the run is read once."""
        found = Counter({Call("decode", self.model.resolution): pictures})
        if self.reward is not None:
            found[self.reward] += pictures
            if self.reward.network == "clip_h14":
                found[Call("clip_h14_text")] += self.prompts
        return found


@dataclass(frozen=True)
class Source:
    """What a SOURCE costs: sides of a sample, and what it samples itself in a whole run."""

    sides: int
    sampling: Callable[[Tuning], Calls] = lambda run: Counter()
    reverse: bool = False  # both sides are the sampler's own steps: with guidance, where it has one
    single: bool = False  # always one transition per sample


def _own_samples(run: Tuning) -> Calls:
    """TargetsAgainstModel: one trajectory for each target, without its last transition."""
    return run.sampled(run.pairs, run.steps - 1)


def _ranked_pairs(run: Tuning) -> Calls:
    """OnlinePairs: rounds of two images per prompt."""
    size = run.objective["pairs_per_round"]
    pictures = 2 * size * math.ceil(run.method.tune.num_updates / (size // run.method.tune.batch_size))
    return run.sampled(pictures, run.steps) + run.judged(pictures)


def _forks(run: Tuning) -> Calls:
    """StepwisePairs: K candidates leave every fork; the call that shows them also goes on from one of them."""
    cfg = run.objective
    length = cfg["inner_steps"] + 1
    count = (run.steps - 1) // length
    prompts, candidates = cfg["prompts_per_round"], cfg["candidates"]
    rounds = math.ceil(run.pairs / (prompts * count * length * run.kept))
    forwards = Counter({run.theta: rounds * prompts * run.guided * (1 + candidates * (run.steps - 1))})
    return forwards + run.judged(rounds * prompts * candidates * count)


SOURCES = {
    "Targets": Source(1),
    "PreferencePairs": Source(2),
    "ContrastPairs": Source(2),
    "TargetsAgainstModel": Source(2, _own_samples),
    "OnlinePairs": Source(2, _ranked_pairs, reverse=True),
    "pso.stepwise:StepwisePairs": Source(2, _forks, reverse=True, single=True),
}


def transitions(run: Tuning, source: Source) -> int:
    """Rows of one side of a sample."""
    cfg = run.objective
    drawn = cfg.get("times") is not None or cfg.get("timestep_mode") == "sample_one"
    return 1 if drawn or source.single else run.steps - 1


def training(run: Tuning, source: Source, steps: int) -> Calls:
    """One pass: theta forward and backward, and pre, where the method has one."""
    rows = run.pairs * steps * source.sides * (run.guided if source.reverse else 1)
    found = Counter({run.theta: rows, run.theta._replace(network="backward"): rows})
    return found + Counter({run.unet: rows if declared(run.method.module)["NEEDS_PRE"] else 0})


def probes(run: Tuning) -> Calls:
    """Samples of the fixed prompts, KL at their transitions, and their judges; at 0, every so often and at the end."""
    tune = run.method.tune
    times = 1 + math.ceil(tune.num_updates / tune.probe_every)
    shown = times * min(tune.probe_prompts, run.prompts)
    found = run.sampled(shown, run.steps if run.probed else run.steps - 1)
    if run.model.sampler in STOCHASTIC:
        both = run.sampled(shown, run.steps - 1)
        found += both + Counter({run.unet: both[run.theta]})
    if run.probed:
        found[Call("decode", run.model.resolution)] += shown
        found.update({judge: shown for judge in run.probed if judge is not None})
    return found


def tuned(run: Tuning) -> dict[str, Calls]:
    """A run's calls by part. KeyError: a SOURCE that is not ours."""
    source = SOURCES[declared(run.method.module)["SOURCE"]]
    sampling = source.sampling(run)
    found = {"sampling": sampling} if sampling else {}
    return found | {"training": training(run, source, transitions(run, source)), "probes": probes(run)}

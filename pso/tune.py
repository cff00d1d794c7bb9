"""One run: tune a model's LoRA with one method. Knows no method by name.

    python -m pso.tune --model sdxl_dmd2 --method pso_offline --seed 0

Writes the LoRA in diffusers' layout, run.json, config.yaml and train.jsonl; to tensorboard/ and wandb/ what `log_with`
asks for. state/ holds the last two checkpoints until the LoRA is there; the same command after an interruption
continues bit for bit. Asked to stop by SIGTERM, SIGUSR1 or Ctrl-C it ends the update, keeps a checkpoint and exits with
75. On several GPUs:

    torchrun --standalone --nproc-per-node 4 -m pso.tune --model sdxl_dmd2 --method pso_offline --seed 0
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from pydantic import BaseModel

from pso import compiled, sources
from pso.checkpoint import Checkpoints
from pso.config import ConfigError, add_arguments, check, from_arguments, import_module
from pso.entries import UNTUNED, Config, MethodEntry
from pso.hub import Hub, hub_dir, recorded
from pso.journal import Journal
from pso.locks import locked
from pso.loop import Loop
from pso.mdp import Chain
from pso.memo import Memo, identity, refuse
from pso.memory import sample_batch
from pso.models import chain_for, load_metric, load_policy
from pso.objective import Objective
from pso.params import kept_params, run_modules
from pso.paths import LORA_FILE, RESULTS, run_dir, scale_dir, subject_of
from pso.policy import Policy
from pso.prefetch import prefetched
from pso.probe import Probe
from pso.provenance import Meter, atomic, digest, fingerprint, fingerprints, record, sentences, write_json
from pso.ranks import Ranks
from pso.runs import off_before
from pso.timeline import NAME as TIMELINE
from pso.timeline import Timeline
from pso.trackers import Trackers, asked, refuse_wandb_without_key
from pso.training_data import give_data
from pso.visits import probed

log = logging.getLogger("tune")
LOCK = ".tune.lock"  # in the run's folder
FREE = ("micro_batch", "checkpoint_every")  # of TuneConfig: a run that goes on may have others


@dataclass
class Run:
    config: Config
    task: str
    model: str
    method: str
    seed: int
    folder: Path
    results: Path

    @property
    def entry(self) -> MethodEntry:
        return self.config.methods[self.method]


def prepare(run: Run, hub: Hub, ranks: Ranks) -> tuple[ModuleType, sources.Given, Any, Probe]:
    """What the run needs, loaded once: the method, what its source is given, the source, the probe."""
    config, entry = run.config, run.entry
    module, cfg, source = method_of(run)
    policy, chain = tuned_model(run, hub, ranks.accelerator.device)
    metrics = {
        name: load_metric(name, config.metrics[name], hub, policy.device, run.model) for name in run.entry.metrics
    }
    reward = metrics.get(entry.reward)
    given = sources.Given(
        policy,
        chain,
        cfg,
        run.seed,
        entry.tune.batch_size,
        reward=reward,
        micro_batch=sample_batch(policy, entry.tune.micro_batch),
        ranks=ranks,
    )
    give_data(given, config, run.model, entry, subject_of(run.task), hub, run.results)
    if policy.speed.compile:
        compiled.check(policy, chain, given.condition)
    every = probed(entry.tune.probe_prompts, len(given.prompts))
    texts = [given.prompts[i] for i in every]
    seen = {name: metrics[name] for name in entry.tune.probe_metrics}
    condition, judge = given.condition.rows(torch.tensor(every)), metrics.get(entry.tune.probe_reward)
    probe = Probe(policy, chain, texts, condition, judge, seen, given.micro_batch)
    return module, given, source(given), probe


def method_of(run: Run) -> tuple[ModuleType, BaseModel, Callable]:
    """The method's module, its Config, and the class of its source: one of pso/sources.py, or `package.module:Name`."""
    where, entry = f"methods.{run.method}", run.entry
    module = import_module(entry.module, f"{where}.module")
    for name in ("Config", "SOURCE", "NEEDS_PRE", "loss"):
        if not hasattr(module, name):
            raise ConfigError(
                f"{where}.module is {entry.module!r}, which has no {name}; expected Config, SOURCE, NEEDS_PRE and loss."
            )
    dotted = module.SOURCE if ":" in module.SOURCE else f"{sources.__name__}:{module.SOURCE}"
    source = import_module(dotted, f"SOURCE in {entry.module}")
    cfg = check(module.Config, entry.objective, f"{where}.objective")
    if entry.tune.pre_memo:
        refuse(run.method, module, source, cfg)
    return module, cfg, source


def memo_of(run: Run, given: sources.Given, source, ranks: Ranks) -> Memo | None:
    """What runs of this model, data and code found out about pre; a file of this run's own for what it finds out."""
    if not run.entry.tune.pre_memo:
        return None
    whose = identity(given.policy, source.chain, lasting(given.pairs.inputs, given), type(source), given.cfg)
    folder = scale_dir(run.config.scale, run.results) / "cache" / run.model / "pre" / whose
    name = "--".join([*run.task.split("/"), run.method, f"seed{run.seed}", f"{ranks.index}of{ranks.count}"])
    return Memo(folder, name)


def tuned_model(run: Run, hub: Hub, device: torch.device) -> tuple[Policy, Chain]:
    """The model with a fresh adapter, and the sampler on the grid on which it is tuned."""
    model, where, scale = run.config.models[run.model], f"models.{run.model}", run.config.scale_entry
    if model.lora_rank is None or model.tuned_steps is None:
        raise ConfigError(f"{where} has no lora_rank or tuned_steps; it is not a model that is tuned.")
    chain = chain_for(run.model, model, model.tuned_steps)
    policy = load_policy(model, hub, getattr(torch, scale.dtype), device, run.model, scale.speed, preview=True)
    try:
        policy.add_lora(model.lora_rank, model.lora_targets, run.seed)
    except ValueError as error:
        raise ConfigError(
            f"{where}.lora_targets is {model.lora_targets}; expected names of linear layers or convolutions of the "
            f"UNet ({str(error).split('. ')[0].rstrip('.')})."
        ) from error
    return policy, chain


def resolved(run: Run, given: sources.Given) -> dict:
    """Every setting of the run, the method's defaults included."""
    config, data = run.config, run.entry.data
    return {
        "scale": config.scale,
        "task": run.task,
        "model": {run.model: config.models[run.model].model_dump()},
        "method": {run.method: {**run.entry.model_dump(), "objective": given.cfg.model_dump(mode="json")}},
        "dataset": {data: recorded(config.datasets[data])},
        "metrics": {name: config.metrics[name].model_dump() for name in run.entry.metrics},
        "seed": run.seed,
        **config.scale_entry.model_dump(include={"dtype", "speed"}),
    }


def tune(run: Run, ranks: Ranks) -> None:
    """Load, go on where an earlier session stopped, train, write the results."""
    meter = Meter()
    hub = Hub(hub_dir(run.config.scale, run.results))
    module, given, source, probe = prepare(run, hub, ranks)
    tuning, policy = run.entry.tune, given.policy
    rates = {"lr": tuning.learning_rate, "weight_decay": tuning.weight_decay}
    optimizer = torch.optim.AdamW(policy.lora_parameters(), **rates, fused=policy.device.type == "cuda")
    optimizer = ranks.accelerator.prepare(optimizer)
    settings, inputs = resolved(run, given), inputs_of(hub, given)
    made_from = {
        "settings": decisive(settings),
        "weights and data": lasting(inputs, given),
        "code": code_of(run, source),
    }
    checkpoints = Checkpoints(run.folder / "state", made_from, meter)
    start = restored(checkpoints, ranks, policy, optimizer, source)
    objective = Objective(module, given.cfg, policy, source.chain, tuning.micro_batch, ranks)
    objective.memo = memo_of(run, given, source, ranks)
    journal, timeline, trackers = None, None, None
    if ranks.main:
        journal = Journal(run.folder / "train.jsonl", start, tuning.num_updates)
        timeline = Timeline(run.folder / TIMELINE)
        gpus = ranks.count if ranks.accelerator.device.type == "cuda" else 0
        timeline.began(start, tuning.num_updates, ranks.count, gpus)
        trackers = Trackers(ranks.accelerator, run.folder, settings, made_from, start, journal.reached, probe)
    with prefetched(source, policy.device, tuning.num_updates) as batches:
        told = journal, timeline, trackers
        loop = Loop(run.method, tuning, given, batches, probe, objective, optimizer, checkpoints, *told)
        counts = loop(start)
    if not ranks.main:
        return
    policy.save_lora(run.folder / "lora")
    meter.counts = counts
    memory = None if objective.plan is None else asdict(objective.plan) | {"sample_batch": given.micro_batch}
    about = {"resumed_at": checkpoints.resumed_at, "final": journal.last, "memory": memory}
    about |= outcome(run, given, source) | decided_by(run) | {"processes": ranks.count}
    write_json(run.folder / "run.json", record("tune", settings, inputs, meter, **about))
    with atomic(run.folder / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings, sort_keys=False))
    checkpoints.finish()
    timeline.ended(tuning.num_updates)
    trackers.end()


def restored(checkpoints: Checkpoints, ranks: Ranks, policy: Policy, optimizer, source) -> int:
    """The update to go on from. The main process looks first, because it removes checkpoints that are not whole."""
    start = checkpoints.restore(policy, optimizer, source) if ranks.main else 0
    ranks.wait()
    if not ranks.main:
        start = checkpoints.restore(policy, optimizer, source)
    return start


def decisive(settings: dict) -> dict:
    """The settings without those that may differ from session to session."""
    methods = {
        name: {**entry, "tune": {k: v for k, v in entry["tune"].items() if k not in FREE}}
        for name, entry in settings["method"].items()
    }
    return {**settings, "method": methods}


def code_of(run: Run, source) -> str:
    """Fingerprint of all code that decides the numbers of the run."""
    scorers = [run.config.metrics[name].module for name in run.entry.metrics]
    return fingerprint("pso.tune", run.entry.module, type(source).__module__, *scorers)


def decided_by(run: Run) -> dict:
    """What the workflow runs this job again for, kept for `python -m pso.doctor --why` (pso/why.py)."""
    modules = fingerprints(*run_modules(run.config, run.method))
    return {"params": kept_params(run.config, run.model, run.method), "modules": modules}


def outcome(run: Run, given: sources.Given, source) -> dict:
    """What was trained and by whose judgement, for run.json."""
    planned = run.entry.tune.num_updates
    judged = {} if given.reward is None else {"reward": given.reward.spec}
    return judged | {
        "steps": {"planned": planned, "done": planned},
        "data": given.pairs.counts if given.pairs else {"prompts": len(given.prompts)},
        "lora_parameters": sum(p.numel() for p in given.policy.lora_parameters()),
        "numerics": given.policy.numerics,
        **({"source": source.summary()} if hasattr(source, "summary") else {}),
    }


def inputs_of(hub: Hub, given: sources.Given) -> list[dict]:
    """Repository, file and sha256 of all that was read, those behind the caches included, each once."""
    caches = [cache for cache in (given.pairs, given.embeddings, given.texts) if cache is not None]
    found = [*hub.inputs(), *(entry for cache in caches for entry in cache.inputs)]
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def lasting(inputs: list[dict], given: sources.Given) -> list:
    """Inputs as a run that goes on has to find them: a cache may have grown by the pairs of other runs meanwhile."""
    found = [{k: v for k, v in i.items() if k != "sha256" or i.get("made_from") is None} for i in inputs]
    return found if given.pairs is None else [*found, digest([given.prompts, given.pairs.prompt_index.tolist()])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--task", default="preference")
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("tune"):
        config = from_arguments(args)
        for kind, name in (("models", args.model), ("methods", args.method)):
            known = getattr(config, kind)
            if name not in known:
                hint = " (nothing is trained for it)" if name == UNTUNED else ""
                raise ConfigError(f"--{kind[:-1]} is {name!r}{hint}; expected one of {', '.join(known)}.")
        folder = run_dir(config.scale, args.task, args.model, args.method, args.seed, args.results)
        trackers = asked(config.log_with, folder, folder.relative_to(args.results).as_posix())
        ranks = Ranks(Accelerator(cpu=not torch.cuda.is_available(), log_with=trackers))
        refuse_idle_processes(config, args.method, ranks)
        if ranks.main:
            refuse_wandb_without_key(config.log_with)
        with locked(folder / LOCK) if ranks.main else contextlib.nullcontext():
            say(folder / "tune.log", ranks)
            for line in off_before(config, args.task, args.model, args.results):
                log.warning("%s", line)
            tune(Run(config, args.task, args.model, args.method, args.seed, folder, args.results), ranks)
            log.info("wrote %s", folder / "lora" / LORA_FILE)
        ranks.end()


def refuse_idle_processes(config: Config, method: str, ranks: Ranks) -> None:
    pairs = config.methods[method].tune.batch_size
    if ranks.count > pairs:
        raise ConfigError(
            f"methods.{method}.tune.batch_size is {pairs}, and the run was started in {ranks.count} processes; "
            "expected at most one process for each sample of an update."
        )


def say(path: Path, ranks: Ranks) -> None:
    """What is logged goes to the console and to a file, from the main process alone."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if ranks.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path))
    level = logging.INFO if ranks.main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=handlers)
    logging.raiseExceptions = False  # of a full disk speaks who needs the room, not the console log


if __name__ == "__main__":
    main()

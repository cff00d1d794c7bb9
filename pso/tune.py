"""One run: tune a model's LoRA with one method. Knows no method by name.

    python -m pso.tune --model sdxl_dmd2 --method pso_offline --seed 0

Writes the LoRA in diffusers' layout, run.json, config.yaml and train.jsonl. state/ holds the last two
checkpoints until the LoRA is there; the same command after an interruption continues bit for bit.
"""

import argparse
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
from torch import Tensor

from pso import sources
from pso.checkpoint import Checkpoints
from pso.config import ConfigError, add_arguments, check, from_arguments, import_module
from pso.entries import UNTUNED, Config, EvidenceConfig, MethodEntry
from pso.evidence import Batch, Evidence, Side, gather
from pso.hub import Hub, hub_dir, recorded
from pso.journal import Journal
from pso.mdp import Chain
from pso.memory import Plan, choose, sample_batch
from pso.models import chain_for, load_metric, load_policy
from pso.params import kept_params, run_modules
from pso.paths import LORA_FILE, RESULTS, run_dir, subject_of
from pso.policy import Conditioning, Policy
from pso.probe import Probe
from pso.provenance import Meter, UserError, atomic, digest, fingerprint, fingerprints, record, sentences, write_json
from pso.runs import off_before
from pso.training_data import give_data
from pso.visits import probed

log = logging.getLogger("tune")


# ---- one update ----


def flatten(side: Side) -> Side:
    """[B, S] -> [B * S, 1]: one row per network call."""
    return Side(side.process, side.n.reshape(-1, 1), side.x.flatten(0, 1)[:, None], side.answer.flatten(0, 1)[:, None])


@dataclass
class Objective:
    """A method module with its Config, and how to get gradients out of it in bounded memory."""

    module: ModuleType
    cfg: EvidenceConfig
    policy: Policy
    chain: Chain
    micro_batch: int
    plan: Plan | None = None  # of the memory, made at the first update

    def evidence_cfg(self) -> EvidenceConfig:
        fields = {k: v for k, v in self.cfg.model_dump().items() if k in EvidenceConfig.model_fields}
        return EvidenceConfig(**fields)

    def evidence(self, chunks: list[Side], condition: Conditioning, eps_pre: Tensor | None) -> list[Evidence]:
        """One forward of theta over all rows of the chunks [R, 1]."""
        eps = self._eps(chunks, condition)
        lengths = [len(c.n) for c in chunks]
        pres = [None] * len(chunks) if eps_pre is None else eps_pre.split(lengths)
        parts = zip(chunks, eps.split(lengths), pres, strict=True)
        return [gather(self.chain, chunk, theta, pre, self.evidence_cfg()) for chunk, theta, pre in parts]

    def pre(self, chunks: list[Side], condition: Conditioning) -> Tensor | None:
        if not self.module.NEEDS_PRE:
            return None
        return self._eps(chunks, condition, pre=True)

    def _eps(self, chunks: list[Side], condition: Conditioning, pre: bool = False) -> Tensor:
        """Of the sampler for steps that it took (with guidance, where it has one), else of the bare network."""
        n, x = (torch.cat([getattr(c, k) for c in chunks]) for k in ("n", "x"))
        sampled = all(c.process == "reverse" for c in chunks)
        network = self.policy.guided_eps if sampled else self.policy.eps
        return network(self.chain, n, x, condition, pre=pre)

    def loss(self, per_side: list[Evidence], batch: Batch) -> tuple[Tensor, dict]:
        """Flat evidence [B * S, 1] -> the method's loss on [B, S]."""
        shape = batch.target.n.shape
        shaped = [
            Evidence(*(None if v is None else v.reshape(shape) for v in (e.ratio, e.raw, e.kl))) for e in per_side
        ]
        target, reference = (shaped + [None])[:2]
        value, extra = self.module.loss(target, reference, batch, self.cfg)
        return value, {**measures(target, reference, batch), **{k: v.item() for k, v in extra.items()}}

    def backward(self, batch: Batch, condition: Conditioning) -> tuple[float, dict]:
        """Gradients of the loss, added to the parameters; (loss, what to log).

        If all rows fit into the micro-batch: one pass. Else two, exact for any loss, also where the
        sum over n stands inside the sigmoid: evidence without graphs, d loss / d evidence, then one
        chunk after the other with that as its incoming gradient.
        """
        sides = [flatten(s) for s in batch.sides]
        prompts = batch.prompts.repeat_interleave(batch.target.n.shape[1]).repeat(len(sides))
        rows = len(prompts)
        if self.plan is None:
            self.plan = choose(self.policy, self.chain, condition, rows, self.micro_batch)
        if rows <= self.plan.micro_batch:
            with_rows = condition.rows(prompts)
            value, logged = self.loss(self.evidence(sides, with_rows, self.pre(sides, with_rows)), batch)
            value.backward()
            return value.item(), logged
        return self._two_passes(sides, prompts, condition, batch)

    def _two_passes(self, sides, prompts, condition, batch) -> tuple[float, dict]:
        per_side = len(prompts) // len(sides)
        chunks = [  # (side, first row, its rows)
            (k, start, side.rows(slice(start, start + self.plan.micro_batch)))
            for k, side in enumerate(sides)
            for start in range(0, per_side, self.plan.micro_batch)
        ]
        conditions = [condition.rows(prompts[start : start + len(c.n)]) for _, start, c in chunks]
        pres, found = [], [[] for _ in sides]
        with torch.no_grad():
            for (k, _, chunk), cond in zip(chunks, conditions, strict=True):
                pres.append(self.pre([chunk], cond))
                found[k] += self.evidence([chunk], cond, pres[-1])
        whole, leaves = [], []
        for parts in found:
            column = {k: _joined([getattr(p, k) for p in parts]) for k in ("ratio", "raw", "kl")}
            name = "ratio" if column["ratio"] is not None else "raw"
            leaves.append((name, column[name].requires_grad_()))
            whole.append(Evidence(**column))
        value, logged = self.loss(whole, batch)
        # None for a side that the loss does not use: its gradient is zero
        incoming = torch.autograd.grad(value, [leaf for _, leaf in leaves], allow_unused=True)
        for (k, start, chunk), cond, pre in zip(chunks, conditions, pres, strict=True):
            if incoming[k] is None:
                continue
            name = leaves[k][0]
            (evidence,) = self.evidence([chunk], cond, pre)
            getattr(evidence, name).backward(incoming[k][start : start + len(chunk.n)])
        return value.item(), logged


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return None if any(part is None for part in parts) else torch.cat(parts)  # no KL where a row has none


def measures(target: Evidence, reference: Evidence | None, batch: Batch) -> dict:
    """What tells more than the loss, which stays near log 2 while a preference method works."""
    if target.ratio is None:
        return {"error": -target.raw.mean().item()}
    if reference is None:
        return {}
    margin = (target.ratio - reference.ratio).detach().sum(1)
    found = {"margin": margin.mean().item(), "implicit_accuracy": (margin > 0).float().mean().item()}
    if target.kl is None or reference.kl is None:
        return found
    both = torch.stack([target.kl, reference.kl]).mean((0, 1))
    steps = batch.target.n
    same = bool((steps == steps[0]).all())
    per_step = {int(n): round(v, 8) for n, v in zip(steps[0], both.tolist(), strict=True)} if same else None
    return {**found, "kl_batch": per_step if per_step else both.mean().item()}


# ---- the run ----


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


def prepare(run: Run, hub: Hub, device: torch.device) -> tuple[ModuleType, sources.Given, Any, Probe]:
    """What the run needs, loaded once: the method, what its source is given, the source, the probe."""
    config, entry = run.config, run.entry
    module, cfg, source = method_of(run)
    policy, chain = tuned_model(run, hub, device)
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
    )
    give_data(given, config, run.model, entry, subject_of(run.task), hub, run.results)
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
    return module, check(module.Config, entry.objective, f"{where}.objective"), source


def tuned_model(run: Run, hub: Hub, device: torch.device) -> tuple[Policy, Chain]:
    """The model with a fresh adapter, and the sampler on the grid on which it is tuned."""
    model, where = run.config.models[run.model], f"models.{run.model}"
    if model.lora_rank is None or model.tuned_steps is None:
        raise ConfigError(f"{where} has no lora_rank or tuned_steps; it is not a model that is tuned.")
    chain = chain_for(run.model, model, model.tuned_steps)
    policy = load_policy(model, hub, getattr(torch, run.config.scale_entry.dtype), device, run.model)
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
        "dtype": config.scale_entry.dtype,
    }


def one_process() -> Accelerator:
    """The accelerator, which must not span several processes: each would train on the same batch and write here."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise UserError(
            f"a run was started in {accelerator.num_processes} processes; expected one process for each run: start it "
            "without a launcher, and run several runs side by side with `snakemake --cores`."
        )
    return accelerator


def tune(run: Run, accelerator: Accelerator) -> None:
    """The loop: accelerate, AdamW, checkpoints, log."""
    meter, tuning = Meter(), run.entry.tune
    hub = Hub(hub_dir(run.config.scale, run.results))
    module, given, source, probe = prepare(run, hub, accelerator.device)
    policy = given.policy
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=tuning.learning_rate, weight_decay=tuning.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    settings, inputs = resolved(run, given), inputs_of(hub, given)
    made_from = {"settings": settings, "weights and data": lasting(inputs, given), "code": code_of(run, source)}
    checkpoints = Checkpoints(run.folder / "state", made_from, meter)
    start = checkpoints.restore(policy, optimizer, source)
    objective = Objective(module, given.cfg, policy, source.chain, tuning.micro_batch)
    journal = Journal(run.folder / "train.jsonl", start, tuning.num_updates)
    if not start:
        journal.write({"event": "probe", "update": 0, **probe()})

    for update in range(start, tuning.num_updates):
        batch = source.batch(update)
        loss, logged = objective.backward(batch, given.condition)
        norm = accelerator.clip_grad_norm_(policy.lora_parameters(), tuning.max_grad_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"{run.folder}: loss {loss} and gradient norm {norm.item()} at update {update + 1}; remove "
                f"{checkpoints.folder}, lower methods.{run.method}.tune.learning_rate and run the same command again."
            )
        optimizer.step()
        optimizer.zero_grad()
        done = update + 1
        journal.update(done, {"loss": loss, **logged, **batch.log, "grad_norm": norm.item()})
        last = done == tuning.num_updates
        if done % tuning.probe_every == 0 or last:
            journal.write({"event": "probe", "update": done, **probe()})
        if done % tuning.checkpoint_every == 0 and not last:
            checkpoints.save(done, policy, optimizer, source)

    policy.save_lora(run.folder / "lora")
    meter.counts = {"unet_forwards": policy.unet_forwards}
    if hasattr(source, "reward_queries"):
        meter.counts["reward_queries"] = source.reward_queries
    memory = None if objective.plan is None else asdict(objective.plan) | {"sample_batch": given.micro_batch}
    about = {"resumed_at": checkpoints.resumed_at, "final": journal.last, "memory": memory}
    about |= outcome(run, given, source) | decided_by(run)
    write_json(run.folder / "run.json", record("tune", settings, inputs, meter, **about))
    with atomic(run.folder / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings, sort_keys=False))
    checkpoints.remove()


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
    caches = [cache for cache in (given.pairs, given.embeddings) if cache is not None]
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
        accelerator = one_process()
        folder = run_dir(config.scale, args.task, args.model, args.method, args.seed, args.results)
        folder.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[logging.StreamHandler(sys.stderr), logging.FileHandler(folder / "tune.log")],
        )
        logging.raiseExceptions = False  # of a full disk speaks who needs the room, not the console log
        for line in off_before(config, args.task, args.model, args.results):
            log.warning("%s", line)
        tune(Run(config, args.task, args.model, args.method, args.seed, folder, args.results), accelerator)
        log.info("wrote %s", folder / "lora" / LORA_FILE)


if __name__ == "__main__":
    main()

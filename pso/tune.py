"""One run: tune a model's LoRA with one method. Knows no method by name.

    python -m pso.tune --model sdxl_dmd2 --method pso_offline --seed 0

Writes the LoRA in diffusers' layout, run.json, config.yaml and train.jsonl. state/ holds the last two
checkpoints until the LoRA is there; the same command after an interruption continues bit for bit.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from pso import sources
from pso.caches import PairCache, load_prompt_set
from pso.checkpoint import Checkpoints
from pso.config import ConfigError, add_arguments, check, from_arguments, import_module
from pso.entries import UNTUNED, Config, EvidenceConfig, MethodEntry
from pso.evidence import Batch, Evidence, Side, gather, kl
from pso.hub import Hub, hub_dir
from pso.mdp import Chain
from pso.models import chain_for, load_metric, load_policy
from pso.paths import LORA_FILE, RESULTS, run_dir
from pso.policy import Conditioning, Policy, to_images
from pso.provenance import Meter, UserError, atomic, record, sentences, write_json
from pso.rollout import rollout

log = logging.getLogger("tune")
PROGRESS_S = 10.0  # seconds between progress lines


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

    def evidence_cfg(self) -> EvidenceConfig:
        fields = {k: v for k, v in self.cfg.model_dump().items() if k in EvidenceConfig.model_fields}
        return EvidenceConfig(**fields)

    def evidence(self, chunks: list[Side], condition: Conditioning, eps_pre: Tensor | None) -> list[Evidence]:
        """One forward of theta over all rows of the chunks [R, 1]."""
        n, x = (torch.cat([getattr(c, k) for c in chunks]) for k in ("n", "x"))
        eps = self.policy.eps(self.chain, n, x, condition)
        lengths = [len(c.n) for c in chunks]
        pres = [None] * len(chunks) if eps_pre is None else eps_pre.split(lengths)
        parts = zip(chunks, eps.split(lengths), pres, strict=True)
        return [gather(self.chain, chunk, theta, pre, self.evidence_cfg()) for chunk, theta, pre in parts]

    def pre(self, chunks: list[Side], condition: Conditioning) -> Tensor | None:
        if not self.module.NEEDS_PRE:
            return None
        n, x = (torch.cat([getattr(c, k) for c in chunks]) for k in ("n", "x"))
        return self.policy.eps(self.chain, n, x, condition, pre=True)

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
        if rows <= self.micro_batch:
            with_rows = condition.rows(prompts)
            value, logged = self.loss(self.evidence(sides, with_rows, self.pre(sides, with_rows)), batch)
            value.backward()
            return value.item(), logged
        return self._two_passes(sides, prompts, condition, batch)

    def _two_passes(self, sides, prompts, condition, batch) -> tuple[float, dict]:
        per_side = len(prompts) // len(sides)
        chunks = [  # (side, first row, its rows)
            (k, start, side.rows(slice(start, start + self.micro_batch)))
            for k, side in enumerate(sides)
            for start in range(0, per_side, self.micro_batch)
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
        incoming = torch.autograd.grad(value, [leaf for _, leaf in leaves])
        for (k, start, chunk), cond, pre in zip(chunks, conditions, pres, strict=True):
            name = leaves[k][0]
            (evidence,) = self.evidence([chunk], cond, pre)
            getattr(evidence, name).backward(incoming[k][start : start + len(chunk.n)])
        return value.item(), logged


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


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


# ---- the sampler as it is now ----


class Probe:
    """KL(theta | pre) of every transition under theta's own samples, and their reward: fixed prompts and noise."""

    def __init__(self, policy: Policy, chain: Chain, prompts: list[str], condition: Conditioning, reward):
        self.policy, self.chain, self.prompts = policy, chain, prompts
        self.condition, self.reward = condition, reward
        self.keys = [("probe", i) for i in range(len(prompts))]

    @torch.no_grad()
    def __call__(self) -> dict:
        trajectory = rollout(self.policy, self.chain, self.condition, self.keys, to_x0=self.reward is not None)
        before, _ = trajectory.transitions
        n = torch.tensor(self.chain.trained_steps).expand(before.shape[:2])
        rows = self.condition.rows(torch.arange(len(before)).repeat_interleave(before.shape[1]))
        theta, pre = (self.policy.eps(self.chain, n, before, rows, pre=flag) for flag in (False, True))
        divergence = kl(self.chain, n, before, theta, pre, "mean").mean(0).tolist()
        found: dict = {"kl": {str(s): v for s, v in zip(self.chain.trained_steps, divergence, strict=True)}}
        if self.reward is not None:
            images = to_images(self.policy.decode(trajectory.x0))
            found["reward"] = self.reward.score(images, self.prompts).mean().item()
        return found


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


def prepare(run: Run, hub: Hub) -> tuple[sources.Given, ModuleType, Probe]:
    """Load what the run needs, once."""
    config, entry = run.config, run.entry
    model = config.models[run.model]
    if model.lora_rank is None or model.tuned_steps is None:
        raise ConfigError(f"models.{run.model} has no lora_rank or tuned_steps; it is not a model that is tuned.")
    module = import_module(entry.module, f"methods.{run.method}.module")
    cfg = check(module.Config, entry.objective, f"methods.{run.method}.objective")
    policy = load_policy(model, hub, getattr(torch, config.scale_entry.dtype))
    policy.add_lora(model.lora_rank, model.lora_targets, run.seed)
    chain = chain_for(run.model, model, model.tuned_steps)
    names = {entry.reward, entry.tune.probe_reward} - {None}
    metrics = {name: load_metric(name, config.metrics[name], hub, policy.device, run.model) for name in sorted(names)}
    reward = metrics.get(entry.reward)
    given = sources.Given(policy, chain, cfg, run.seed, entry.tune.batch_size, reward=reward)
    dataset = config.datasets[entry.data]
    if dataset.format == "preference_parquet":
        given.pairs = PairCache(config.scale, run.model, entry.data, run.results)
        given.prompts, given.condition = given.pairs.prompts, given.pairs.condition(policy.device)
    else:
        given.prompts = [p.text for p in load_prompt_set(hub, dataset, entry.data)]
        given.condition = policy.encode_prompts(given.prompts)
    shown = min(entry.tune.probe_prompts, len(given.prompts))
    every = [i * len(given.prompts) // shown for i in range(shown)]
    texts = [given.prompts[i] for i in every]
    probe = Probe(policy, chain, texts, given.condition.rows(torch.tensor(every)), metrics.get(entry.tune.probe_reward))
    return given, module, probe


def tune(run: Run) -> None:
    """The loop: accelerate, AdamW, checkpoints, log."""
    meter, tuning = Meter(), run.entry.tune
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    hub = Hub(hub_dir(run.config.scale, run.results))
    given, module, probe = prepare(run, hub)
    policy = given.policy
    source = sources.find(module.SOURCE)(given)
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=tuning.learning_rate, weight_decay=tuning.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    checkpoints = Checkpoints(run.folder / "state", resolved(run))
    start = checkpoints.restore(policy, optimizer, source)
    objective = Objective(module, given.cfg, policy, source.chain, tuning.micro_batch)
    journal = Journal(run.folder / "train.jsonl", start, tuning.num_updates)
    if start:
        log.info("continuing after update %d", start)
    else:
        journal.write({"event": "probe", "update": 0, **probe()})

    for update in range(start, tuning.num_updates):
        batch = source.batch(update)
        loss, logged = objective.backward(batch, given.condition)
        norm = accelerator.clip_grad_norm_(policy.lora_parameters(), tuning.max_grad_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"{run.folder}: loss {loss} and gradient norm {norm.item()} at update {update + 1}; the last good "
                "state is kept. Lower methods.tune.learning_rate and run the same command again."
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
    meter.counts = {"unet_forwards": policy.unet_forwards + checkpoints.earlier_forwards}
    if hasattr(source, "reward_queries"):
        meter.counts["reward_queries"] = source.reward_queries
    finish(run, hub, meter, journal, given, checkpoints, source)


def resolved(run: Run) -> dict:
    """All settings of this run, nested."""
    return {
        "scale": run.config.scale,
        "task": run.task,
        "model": {run.model: run.config.models[run.model].model_dump()},
        "method": {run.method: run.entry.model_dump()},
        "seed": run.seed,
        "dtype": run.config.scale_entry.dtype,
    }


def finish(run: Run, hub: Hub, meter: Meter, journal, given, checkpoints, source) -> None:
    """run.json and config.yaml; the checkpoints are not needed any more."""
    settings = resolved(run)
    more = {
        "steps": {"planned": run.entry.tune.num_updates, "done": run.entry.tune.num_updates},
        "resumed_at": checkpoints.resumed_at,
        "final": journal.last,
        "data": given.pairs.counts if given.pairs else {"prompts": len(given.prompts)},
        "lora_parameters": sum(p.numel() for p in given.policy.lora_parameters()),
    }
    if given.reward is not None:
        more["reward"] = given.reward.spec
    if hasattr(source, "summary"):
        more["source"] = source.summary()
    write_json(run.folder / "run.json", record("tune", settings, hub.inputs(), meter, **more))
    with atomic(run.folder / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings, sort_keys=False))
    shutil.rmtree(run.folder / "state", ignore_errors=True)


class Journal:
    """train.jsonl, and a progress line on the console now and then."""

    def __init__(self, path: Path, start: int, planned: int):
        self.path, self.start, self.planned, self.last = path, start, planned, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if start and path.exists():  # forget what was logged after the checkpoint
            lines = path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["update"] <= start]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.began = self.printed = time.monotonic()

    def write(self, entry: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def update(self, done: int, values: dict) -> None:
        self.last = values
        self.write({"event": "update", "update": done, **values})
        now = time.monotonic()
        if now - self.printed < PROGRESS_S and done != self.planned:
            return
        self.printed = now
        each = (now - self.began) / (done - self.start)
        minutes, seconds = divmod(round(each * (self.planned - done)), 60)
        shown = ("loss", "margin", "implicit_accuracy", "clip_fraction", "reward_target")
        numbers = "  ".join(f"{k} {values[k]:.4g}" for k in shown if k in values)
        log.info("update %d/%d  %s  %.2f s each  left %d:%02d", done, self.planned, numbers, each, minutes, seconds)


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
        folder.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[logging.StreamHandler(sys.stderr), logging.FileHandler(folder / "tune.log")],
        )
        tune(Run(config, args.task, args.model, args.method, args.seed, folder, args.results))
        log.info("wrote %s", folder / "lora" / LORA_FILE)


if __name__ == "__main__":
    main()

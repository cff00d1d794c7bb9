"""The gradient of one update: network rows -> evidence -> the method's loss -> gradients of the LoRA.

In bounded memory, and in any number of processes, exact for any loss, also where the sum over n stands inside the
sigmoid: the loss is a function of a small tensor of evidence, so its derivative by that tensor is all that the
network's rows need of it, in whatever calls and processes they are made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pso.entries import EvidenceConfig
from pso.evidence import Batch, Evidence, Side, gather
from pso.mdp import Chain
from pso.memory import Plan, choose
from pso.policy import Conditioning, Policy
from pso.provenance import UserError
from pso.ranks import Ranks

COLUMNS = ("ratio", "raw", "kl")


def flatten(side: Side) -> Side:
    """[B, S] -> [B * S, 1]: one row per network call."""
    return Side(side.process, side.n.reshape(-1, 1), side.x.flatten(0, 1)[:, None], side.answer.flatten(0, 1)[:, None])


class Call(NamedTuple):
    """Rows that go through the network together: chunks [R, 1] of sides, the prompts [all R] of their rows, and for
    each chunk its side and first row."""

    chunks: list[Side]
    prompts: Tensor
    places: list[tuple[int, int]]


@dataclass
class Objective:
    """A method module with its Config, and how to get gradients out of it."""

    module: ModuleType
    cfg: EvidenceConfig
    policy: Policy
    chain: Chain
    micro_batch: int
    ranks: Ranks = field(default_factory=Ranks)
    plan: Plan | None = None  # of the memory, made at the first update
    rows: int = 0  # of this process in an update

    def evidence_cfg(self) -> EvidenceConfig:
        fields = {k: v for k, v in self.cfg.model_dump().items() if k in EvidenceConfig.model_fields}
        return EvidenceConfig(**fields)

    def evidence(self, call: Call, condition: Conditioning, eps_pre: Tensor | None) -> list[Evidence]:
        """Of each chunk, by one forward of theta."""
        eps = self._eps(call, condition)
        lengths = [len(c.n) for c in call.chunks]
        pres = [None] * len(lengths) if eps_pre is None else eps_pre.split(lengths)
        parts = zip(call.chunks, eps.split(lengths), pres, strict=True)
        return [gather(self.chain, chunk, theta, pre, self.evidence_cfg()) for chunk, theta, pre in parts]

    def pre(self, call: Call, condition: Conditioning) -> Tensor | None:
        return self._eps(call, condition, pre=True) if self.module.NEEDS_PRE else None

    def _eps(self, call: Call, condition: Conditioning, pre: bool = False) -> Tensor:
        """Of the sampler for steps that it took (with guidance, where it has one), else of the bare network."""
        n, x = (torch.cat([getattr(c, k) for c in call.chunks]) for k in ("n", "x"))
        sampled = all(c.process == "reverse" for c in call.chunks)
        network = self.policy.guided_eps if sampled else self.policy.eps
        return network(self.chain, n, x, condition.rows(call.prompts), pre=pre)

    def backward(self, batch: Batch, condition: Conditioning) -> tuple[Tensor, dict]:
        """Gradients of the loss of the whole batch, added to the parameters; (loss, what to log), still on the device:
        nothing here waits for the network (`numbers` does, once).

        If this process's rows fit into the micro-batch, each goes through the network once. Else twice: for the
        evidence, without a graph, and again for the gradient, one chunk after the other.
        """
        calls = self._calls(batch, condition)
        once = len(calls) == 1
        with self.ranks.together():
            pres = [self.pre(call, condition) for call in calls]
            with torch.set_grad_enabled(once):
                found = [self.evidence(call, condition, pre) for call, pre in zip(calls, pres, strict=True)]
        whole = self._whole(batch, calls, found)
        name = "raw" if whole[0].ratio is None else "ratio"
        leaves = [getattr(side, name).requires_grad_() for side in whole]
        value, logged = self.loss(whole, batch)
        # None for a side that the loss does not use: its gradient is zero
        incoming = torch.autograd.grad(value, leaves, allow_unused=True)
        own = self.ranks.share(len(batch.prompts))
        incoming = [None if grad is None else grad[own].reshape(-1, 1) for grad in incoming]
        with self.ranks.together():
            for call, pre, made in zip(calls, pres, found, strict=True):
                if any(incoming[side] is not None for side, _ in call.places):
                    self._back(call, made if once else self.evidence(call, condition, pre), name, incoming)
        self.ranks.add_up_gradients(self.policy.lora_parameters())
        return value.detach(), logged

    def loss(self, per_side: list[Evidence], batch: Batch) -> tuple[Tensor, dict]:
        """The method's, and what to log."""
        target, reference = (per_side + [None])[:2]
        value, extra = self.module.loss(target, reference, batch, self.cfg)
        return value, {**measures(target, reference, batch), **extra}

    def _calls(self, batch: Batch, condition: Conditioning) -> list[Call]:
        """This process's rows: one call with all of them, or chunks of one side each."""
        own = self.ranks.share(len(batch.prompts))
        sides = [flatten(side.rows(own)) for side in batch.sides]
        prompts = batch.prompts[own].repeat_interleave(batch.target.n.shape[1])
        self.rows = len(sides) * len(prompts)
        if self.plan is None:
            self.plan = choose(self.policy, self.chain, condition, self.rows, self.micro_batch)
        size = self.plan.micro_batch
        if self.rows <= size:
            return [Call(sides, prompts.repeat(len(sides)), [(k, 0) for k in range(len(sides))])]
        return [
            Call([side.rows(slice(start, start + size))], prompts[start : start + size], [(k, start)])
            for k, side in enumerate(sides)
            for start in range(0, len(prompts), size)
        ]

    def _whole(self, batch: Batch, calls: list[Call], found: list[list[Evidence]]) -> list[Evidence]:
        """Each side's evidence [B, S], of all calls and processes, without a graph."""
        made = [
            (side, e)
            for call, parts in zip(calls, found, strict=True)
            for (side, _), e in zip(call.places, parts, strict=True)
        ]
        pairs, steps = batch.target.n.shape
        whole = []
        for side in range(len(batch.sides)):
            columns = {}
            for name in COLUMNS:
                parts = [getattr(evidence, name) for k, evidence in made if k == side]
                absent = self.ranks.any(any(part is None for part in parts))  # no KL where a row has none
                own = None if absent else torch.cat(parts).detach().reshape(-1, steps)
                columns[name] = None if own is None else self.ranks.whole(own, pairs)
            whole.append(Evidence(**columns))
        return whole

    def _back(self, call: Call, made: list[Evidence], name: str, incoming: list[Tensor | None]) -> None:
        """The chain rule's other half."""
        values, grads = [], []
        for evidence, (side, first) in zip(made, call.places, strict=True):
            if incoming[side] is not None:
                values.append(getattr(evidence, name))
                grads.append(incoming[side][first : first + len(values[-1])])
        torch.autograd.backward(values, grads)

    def use_less_memory(self) -> str:
        """After memory ran out: half the rows at a time, at last one row with its activations formed again. What was
        changed; a sentence if nothing is left to change."""
        plan, size = self.plan, min(self.plan.micro_batch, self.rows)
        for parameter in self.policy.lora_parameters():
            parameter.grad = None
        if size > 1:
            self.plan = replace(plan, micro_batch=size // 2)
            return f"{size // 2} instead of {size} of an update's rows go through the network at a time"
        if not plan.gradient_checkpointing:
            self.plan = replace(plan, gradient_checkpointing=True)
            self.policy.gradient_checkpointing(True)
            return "activations are formed again in the backward pass instead of kept"
        raise UserError(
            f"memory ran out with 1 row at a time and gradient checkpointing at {self.policy.resolution} px; take a "
            "GPU with more memory, or end what else runs on this one, and run the same command again."
        )


def measures(target: Evidence, reference: Evidence | None, batch: Batch) -> dict:
    """What tells more than the loss, which stays near log 2 while a preference method works."""
    if target.ratio is None:
        return {"error": -target.raw.detach().mean()}
    if reference is None:
        return {}
    margin = (target.ratio - reference.ratio).detach().sum(1)
    found = {"margin": margin.mean(), "implicit_accuracy": (margin > 0).float().mean()}
    if target.kl is None or reference.kl is None:
        return found
    both = torch.stack([target.kl, reference.kl]).mean((0, 1))
    steps = batch.target.n
    same = bool((steps == steps[0]).all())
    per_step = dict(zip(steps[0].tolist(), both, strict=True)) if same else None
    return {**found, "kl_batch": per_step if per_step else both.mean()}


def numbers(found: dict) -> dict:
    """Tensors of one element, also in dicts of dicts, as plain numbers: by one transfer, for which the host waits."""
    tensors = list(_tensors(found))
    device = tensors[0].device if tensors else None
    values = torch.stack([v.detach().to(device, torch.float64) for v in tensors]).tolist() if tensors else []
    return _filled(found, iter(values))


def _tensors(found: dict) -> Iterator[Tensor]:
    for value in found.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _filled(found: dict, values: Iterator[float]) -> dict:
    """In the order of `_tensors`."""
    filled = {}
    for key, value in found.items():
        if isinstance(value, dict):
            filled[key] = _filled(value, values)
        else:
            filled[key] = next(values) if isinstance(value, Tensor) else value
    return filled

"""The updates of a run: batch, gradient, step, log, probe, checkpoint; and what can go wrong between them."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pso.checkpoint import Checkpoints
from pso.entries import TuneConfig
from pso.evidence import Batch
from pso.journal import Journal
from pso.objective import Objective, numbers
from pso.probe import Probe
from pso.provenance import UserError
from pso.ranks import Ranks
from pso.sources import Given
from pso.stopping import EXIT_CODE, Stopping
from pso.timeline import Timeline
from pso.trackers import Trackers

log = logging.getLogger("tune")
T = TypeVar("T")
SHOWN = 3  # prompts of a batch that a sentence names


@dataclass
class Loop:
    """`method`: the name of its entry, for sentences."""

    method: str
    tuning: TuneConfig
    given: Given
    source: Any
    probe: Probe
    objective: Objective
    optimizer: Any
    checkpoints: Checkpoints
    journal: Journal | None  # of the main process
    timeline: Timeline | None
    trackers: Trackers | None

    @property
    def ranks(self) -> Ranks:
        return self.objective.ranks

    def __call__(self, start: int) -> dict[str, int]:
        """Every update after `start`; what was counted in all processes. Exits with 75 when it is asked to stop."""
        tuning = self.tuning
        with Stopping().heard() as stopping:
            if not start:
                self.look(0)
            for update in range(start, tuning.num_updates):
                self.update(update)
                done, last = update + 1, update + 1 == tuning.num_updates
                if done % tuning.probe_every == 0 or last:
                    self.look(done)
                asked = self.ranks.any(stopping.asked is not None)
                if not last and (asked or done % tuning.checkpoint_every == 0):
                    self.keep(done)
                if asked and not last:
                    self.stop(done, stopping.asked or "a signal to another process")
        self.remember()
        return self.counts()

    def update(self, number: int) -> None:
        """One step of the optimiser."""
        batch = retried(lambda: self.source.batch(number), self.sample_fewer)
        loss, logged = retried(
            lambda: self.objective.backward(batch, self.given.condition), self.objective.use_less_memory
        )
        parameters = self.given.policy.lora_parameters()
        norm = self.ranks.accelerator.clip_grad_norm_(parameters, self.tuning.max_grad_norm)
        # the one time in an update that the host waits for the device
        found = numbers({"loss": loss, **logged, **batch.log, "grad_norm": norm})
        if not math.isfinite(found["grad_norm"]):
            raise self.broken(number, batch, found["loss"], found["grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.given.policy.lora_changed()
        if self.ranks.main:
            self.journal.update(number + 1, found)
            self.timeline.at(number + 1)
            self.trackers.update(number + 1, found, self.optimizer.param_groups[0]["lr"])

    def look(self, done: int) -> None:
        """What the sampler does now. One process looks, the others wait for its gradients."""
        if self.ranks.main:
            found = retried(self.probe, self.sample_fewer)
            self.journal.write({"event": "probe", "update": done, **found})
            self.trackers.probe(done, found, self.probe)

    def keep(self, done: int) -> None:
        """A checkpoint; all processes count."""
        self.remember()
        forwards = self.ranks.total(self.given.policy.unet_forwards)
        if self.ranks.main:
            self.checkpoints.meter.counts = {"unet_forwards": forwards}
            self.checkpoints.save(done, self.given.policy, self.optimizer, self.source)

    def remember(self) -> None:
        """Each process writes what it found out about pre."""
        if self.objective.memo is not None:
            self.objective.memo.write()

    def stop(self, done: int, signal: str) -> None:
        if self.ranks.main:
            self.timeline.stopped(done, signal)
            self.trackers.end()
        log.warning(
            "%s: stopped after update %d of %d, which is kept; the same command goes on from there",
            signal, done, self.tuning.num_updates,
        )  # fmt: skip
        self.ranks.end()
        raise SystemExit(EXIT_CODE)

    def counts(self) -> dict[str, int]:
        found = {"unet_forwards": self.ranks.total(self.given.policy.unet_forwards)}
        if self.objective.memo is not None:
            found |= {name: self.ranks.total(count) for name, count in self.objective.memo.counts().items()}
        queries = getattr(self.source, "reward_queries", None)
        return found if queries is None else found | {"reward_queries": queries}

    def broken(self, number: int, batch: Batch, loss: float, norm: float) -> UserError:
        """An update that is no number: what was before it is kept, if that is still sound."""
        sound = all(bool(torch.isfinite(p).all()) for p in self.given.policy.lora_parameters())
        if number and sound:
            self.keep(number)
        why = f"loss {loss} and gradient norm {norm}"
        if self.ranks.main:
            self.timeline.stopped(number, why)
        kept = "the state before it is kept" if number and sound else "earlier checkpoints are kept"
        state = self.checkpoints.folder
        return UserError(
            f"{state.parent}: {why} at update {number + 1}, on {self.named(batch)}; {kept}. If it happens again, "
            f"remove {state}, lower methods.{self.method}.tune.learning_rate and run the same command again."
        )

    def named(self, batch: Batch) -> str:
        """The prompts of a batch; what is behind the last one is the empty caption."""
        texts = [self.given.prompts[i] if i < len(self.given.prompts) else "" for i in batch.prompts.tolist()]
        more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
        return "prompts " + ", ".join(map(repr, texts[:SHOWN])) + more

    def sample_fewer(self) -> str:
        """After memory ran out while pictures were sampled, decoded or scored."""
        count = self.given.micro_batch
        if count == 1:
            raise UserError(
                "memory ran out while 1 picture was sampled, decoded and scored; take a GPU with more memory, or end "
                "what else runs on this one, and run the same command again."
            )
        self.given.micro_batch = self.probe.micro_batch = count // 2
        return f"{count // 2} instead of {count} pictures are sampled at a time"


def retried(action: Callable[[], T], less: Callable[[], str]) -> T:
    """Again and with `less` as long as memory runs out, which changes results in their last bits at most."""
    while True:
        try:
            return action()
        except torch.OutOfMemoryError as error:
            why = str(error).partition(".")[0]
        # here, where no traceback holds tensors any more
        log.warning("memory ran out (%s): from here on %s", why, less())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

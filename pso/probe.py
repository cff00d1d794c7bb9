"""The sampler as it is while it is tuned, on fixed prompts and noise: what train.jsonl tells beside the loss."""

import torch

from pso.evidence import kl
from pso.mdp import Chain
from pso.policy import Conditioning, Policy, to_images
from pso.rollout import Trajectory, rollouts


class Probe:
    """KL(theta | pre) of every transition under theta's own samples, and what scorers say of these: their reward, and
    `metrics` by name. Prompts and noise are fixed. A deterministic sampler has no KL. At most `micro_batch` pictures
    are sampled and decoded, and rows of the network called, at a time."""

    def __init__(
        self,
        policy: Policy,
        chain: Chain,
        prompts: list[str],
        condition: Conditioning,
        reward,
        metrics: dict,
        micro_batch: int = 256,
    ):
        self.policy, self.chain, self.prompts, self.micro_batch = policy, chain, prompts, micro_batch
        self.condition, self.reward, self.metrics = condition, reward, metrics
        self.keys = [("probe", i) for i in range(len(prompts))]
        self.keeps_pictures, self.pictures = False, []  # of the last call, where somebody shows them (pso/trackers.py)

    @property
    def scorers(self) -> dict:
        """By the names under which their means are told; without any no picture is made."""
        return {**self.metrics, **({} if self.reward is None else {"reward": self.reward})}

    @torch.no_grad()
    def __call__(self) -> dict:
        scorers = self.scorers
        sampled = rollouts(
            self.policy, self.chain, self.condition, self.keys, to_x0=bool(scorers), micro_batch=self.micro_batch
        )
        parts = [(part, self.policy.preview(part.x0) if scorers else None) for part in sampled]
        trajectory = Trajectory(*(torch.cat([getattr(part, k) for part, _ in parts]) for k in ("states", "x0")))
        found: dict = {"kl": self.divergence(trajectory) if self.chain.stochastic else {}}
        if not scorers:
            return found
        images = to_images(torch.cat([pictures for _, pictures in parts]))
        self.pictures = images if self.keeps_pictures else []
        means = {name: scorer.score(images, self.prompts).mean().item() for name, scorer in scorers.items()}
        return found | ({"reward": means.pop("reward")} if self.reward is not None else {}) | {"metrics": means}

    def divergence(self, trajectory: Trajectory) -> dict[str, float]:
        """Transition -> KL, mean over the latent's elements and the prompts."""
        before, _ = trajectory.transitions
        n = torch.tensor(self.chain.trained_steps).expand(before.shape[:2])
        rows = torch.arange(len(before)).repeat_interleave(before.shape[1])
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(rows), self.micro_batch)]
        number, x = n.reshape(-1), before.flatten(0, 1)
        theta, pre = (
            torch.cat(
                [
                    self.policy.guided_eps(self.chain, number[p], x[p], self.condition.rows(rows[p]), pre=flag)
                    for p in parts
                ]
            ).view_as(before)
            for flag in (False, True)
        )
        found = kl(self.chain, n, before, theta, pre, "mean").mean(0).tolist()
        return {str(step): value for step, value in zip(self.chain.trained_steps, found, strict=True)}

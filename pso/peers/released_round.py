"""A round of Online PSO as its authors released it: sample, decode, score, train.

Made again from ZichenMiao/Pairwise_Sample_Optimization, `train_online_pso_sdxl_dmd2.py` and its
`diffusers_patch/sdxl_dmd_with_logprob.py`. For each sampling batch of `pairs` prompts (2, Turbo 4): the captions
through the text encoders, two trajectories by theta with the LoRA in float32 under autocast, one step noise for the
whole batch, log-probabilities that nobody uses, decoding, pictures to the CPU and to Pillow, rewards by batches of the
same size. Then one epoch of updates, each of pso/peers/released_pso.py.

Deviations: those of that file; the VAE has the frozen weights' own type for sampling, as there (the mended VAE in
16 bits); shuffling the round over pairs is left out, it costs nothing.
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from pso.evidence import Batch, Side
from pso.peers.released_pso import ReleasedPso
from pso.peers.script import log_probability
from pso.policy import Conditioning

Reward = Callable[[list[Image.Image], list[str]], Tensor]


class ReleasedRound:
    """`vae`: for decoding. `batch`: pairs of an update."""

    def __init__(self, step: ReleasedPso, vae: torch.nn.Module, shape: tuple, reward: Reward, batch: int):
        self.step, self.vae, self.shape, self.reward, self.batch = step, vae, shape, reward, batch

    def __call__(self, prompts: list[str]) -> None:
        size = self.step.form.pairs
        parts = [self.sampled(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for start in range(0, len(prompts), self.batch):
            here = {key: value[start : start + self.batch] for key, value in joined.items()}
            self.step.update(self.pairs_of(here), Conditioning(here["hidden"], here["pooled"]))

    @torch.no_grad()
    def sampled(self, prompts: list[str]) -> dict[str, Tensor]:
        text = self.step.conditions(prompts)
        found = {"hidden": text.hidden, "pooled": text.pooled}
        for name in ("first", "second"):
            states, clean = self.trajectory(text)
            found[name] = torch.stack(states, 1)
            images = [Image.fromarray(image) for image in self.decoded(clean)]
            found[f"reward_{name}"] = self.reward(images, prompts).cpu()
        return found

    def trajectory(self, text: Conditioning) -> tuple[list[Tensor], Tensor]:
        """x_N .. x_1, and the clean latent."""
        schedule, device = self.step.schedule, text.hidden.device
        x = torch.randn((len(text), *self.shape), device=device)
        if schedule.exploding:
            alpha_bar = schedule.alpha_bar[-1]
            x = x * ((1 - alpha_bar) / alpha_bar).sqrt().to(device)
        states = []
        for number in range(len(schedule.times) - 1, 0, -1):
            states.append(x)
            n = torch.full((len(x),), number)
            eps, before = self.step.eps(n, x, text), x
            x = self.stepped(n, x, eps)
            if number > 1:
                log_probability(schedule, n, before, eps, x)
        return states, x

    def stepped(self, n: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        schedule = self.step.schedule
        here, there = schedule.at(n, x), schedule.at(n - 1, x)
        noise = torch.randn((1, *self.shape), device=x.device)  # one for the batch
        clean = (x - (1 - here).sqrt() * eps) / here.sqrt()
        if not schedule.exploding:
            return there.sqrt() * clean + (1 - there).sqrt() * noise  # at n = 1 the clean latent
        clean = x - ((1 - here) / here).sqrt() * eps
        sigma, to = ((1 - here) / here).sqrt(), ((1 - there) / there).sqrt()
        up = (to**2 * (sigma**2 - to**2) / sigma**2).sqrt()
        return clean + (to**2 - up**2).sqrt() * eps + up * noise

    def decoded(self, latents: Tensor) -> list:
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        unit = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return list(unit.permute(0, 2, 3, 1).cpu().numpy())

    def pairs_of(self, here: dict[str, Tensor]) -> Batch:
        """The better of two is the target; a tie has no gradient (DMD2)."""
        first, second = here["first"], here["second"]
        wins = (here["reward_first"] > here["reward_second"]).to(first.device)[:, None, None, None, None]
        ordered = torch.where(wins, first, second), torch.where(wins, second, first)
        count = first.shape[1]
        n = torch.arange(count, 1, -1).expand(len(first), -1)
        sides = [Side("reverse", n, states[:, :-1], states[:, 1:]) for states in ordered]
        tied = (here["reward_first"] == here["reward_second"]).to(first.device)
        return Batch(torch.arange(len(first)), *sides, tied=tied)

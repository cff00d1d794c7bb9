"""Train SPO's step-aware preference model for one distilled model, and say whether it is worth using.

    python -m baselines.preference_training --model sdxl_dmd2

The authors' recipe with the distilled model in place of SDXL: both clean pictures of a pair are noised with the
same eps to a time at which the sampler's forks are scored, the network (guidance off, nothing tuned) predicts
clean latents from them once, and the preference model has to say of these what PickScore says of the clean
pictures; if it is not sure, that is a tie. Pairs count by 1 / (pairs of their prompt).

A tenth of the prompts is held out. The verdict at a time is "go" if the trained model agrees there with
PickScore(clean) more often than PickScore on the same predictions does; at t = 0 the two are one. Where it is
"no-go" the model is not used (baselines/preference_model.py).
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baselines import preference_model as spm
from eval.clip_model import ClipScorer
from pso import state_dicts
from pso.caches import PairCache, at_once
from pso.config import ConfigError, add_arguments, from_arguments
from pso.entries import Config, PreferenceModelFit
from pso.forks import forked_steps, shown_times
from pso.hub import Hub, hub_dir
from pso.mdp import Chain
from pso.models import chain_for, load_metric, load_policy
from pso.paths import RESULTS
from pso.policy import Policy, to_images
from pso.provenance import Meter, atomic, record, sentences, write_json
from pso.rollout import keyed_noise, keyed_seed

log = logging.getLogger("preference model")
BATCH = 64  # held-out pairs judged together
HELD_OUT = 10  # one prompt in so many
WARM_UP = 500 / 7000  # of the steps, the authors'; then down to 0 in a line
PROGRESS_S = 10.0


def file_name(model: str) -> str:
    return f"{model}_step-aware_preference_model.safetensors"


# ---- what it learns from ----


@dataclass(frozen=True)
class Pairs:
    """P pairs, on the CPU: x [P, 2, T, 3, S, S], CLIP's input of the predictions at T times, float16 (24 GB of 20000
    pairs at two times); clean [P, 2], PickScore's logits of the clean pictures; text [P, D]; weight [P]; held_out [P]
    bool."""

    x: Tensor
    clean: Tensor
    text: Tensor
    weight: Tensor
    held_out: Tensor

    def rows(self, index: Tensor) -> "Pairs":
        return Pairs(*(v[index] for v in (self.x, self.clean, self.text, self.weight, self.held_out)))


def look(policy: Policy, chain: Chain, cache: PairCache, base: ClipScorer, count: int, seed: int) -> Pairs:
    """Predict, decode and judge the first `count` pairs of a cache that can be used."""
    first = [i for i in range(min(count + len(cache.left_out), len(cache))) if i not in cache.left_out][:count]
    condition, scale = cache.condition(policy.device), base.model.logit_scale.exp().item()
    steps = [n - 1 for n in forked_steps(chain, 0) if n > 2]  # the next call after a fork; the last fork's is t = 0
    x, found = torch.empty(len(first), 2, len(steps), 3, base.size, base.size, dtype=torch.float16), []
    size = at_once(policy.resolution)
    for start in range(0, len(first), size):
        index = first[start : start + size]
        prompts = cache.prompt_index[index]
        texts = [cache.prompts[i] for i in prompts]
        text = base.text_features(texts)
        clean = torch.cat([cache.latents(side, index)[0] for side in ("target", "reference")]).to(policy.device)
        features = base.image_features(to_images(policy.decode(clean)))
        logits = scale * (features.unflatten(0, (2, -1)) * text).sum(-1).T
        shown = condition.rows(prompts.repeat(2))
        for place, n in enumerate(steps):
            seen = _seen(policy, chain, n, clean, shown, index, seed, base)
            x[start : start + len(index), :, place] = seen.transpose(0, 1)
        found.append((logits.cpu(), text.cpu()))
    prompts = cache.prompt_index[first]
    held_out = torch.tensor([keyed_seed("held out", p) % HELD_OUT == 0 for p in cache.prompts])
    weight = 1 / torch.bincount(prompts).float()
    return Pairs(x, *(torch.cat(v) for v in zip(*found, strict=True)), weight[prompts], held_out[prompts])


def _seen(policy, chain, n, clean, condition, index, seed, base) -> Tensor:
    """[2, B, 3, S, S]: both pictures of each pair, noised to t_n with one eps and predicted back."""
    eps = (
        keyed_noise([(seed, "preference model", i) for i in index], n, clean.shape[1:])
        .to(clean.device)
        .repeat(2, 1, 1, 1)
    )
    number = torch.full((len(clean),), n)
    x = chain.noise_to(number, clean, eps)
    with torch.no_grad():
        x0 = chain.x0_hat(number, x, policy.eps(chain, number, x, condition))
    pictures = to_images(policy.decode(x0))
    return base.pixels(pictures).half().unflatten(0, (2, -1))


# ---- training ----


def logits_of(model: spm.TimeConditioning, base: ClipScorer, pairs: Pairs, row: Tensor) -> Tensor:
    """[P, 2] of predictions at one time per pair; row [P] in the model's table, which is also the place in x."""
    device = base.device
    x = pairs.x[torch.arange(len(row)), :, row].flatten(0, 1).to(device).float()
    features = model.image_features(base.model, x, row.repeat_interleave(2).to(device)).unflatten(0, (-1, 2))
    return base.model.logit_scale.exp() * (features * pairs.text[:, None].to(device)).sum(-1)


def descend(
    model, base: ClipScorer, pairs: Pairs, fit: PreferenceModelFit, seed: int, among: Tensor | None = None
) -> None:
    """AdamW on pairs and times drawn anew for every step. among: numbers of the pairs to draw from, default all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate((step + 1) / fit.num_steps))
    rng = torch.Generator().manual_seed(keyed_seed(seed, "preference model", "order"))
    times, among = pairs.x.shape[2], torch.arange(len(pairs.clean)) if among is None else among
    began = printed = time.monotonic()
    for step in range(fit.num_steps):
        part = pairs.rows(among[torch.randint(len(among), (fit.batch_size,), generator=rng)])
        row = torch.randint(times, (fit.batch_size,), generator=rng)
        label, weight = (v.to(base.device) for v in (spm.labels(part.clean), part.weight))
        loss = spm.preference_loss(logits_of(model, base, part, row), label, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now, done = time.monotonic(), step + 1
        if now - printed > PROGRESS_S or done == fit.num_steps:
            printed, left = now, (now - began) / done * (fit.num_steps - done)
            log.info(
                "preference model %d/%d  loss %.4f  left %d:%02d",
                done,
                fit.num_steps,
                loss.item(),
                *divmod(int(left), 60),
            )


def learning_rate(done: float) -> float:
    """Share of the peak after a share of the steps."""
    return done / WARM_UP if done < WARM_UP else (1 - done) / (1 - WARM_UP)


@torch.no_grad()
def agreement(model, base: ClipScorer, pairs: Pairs) -> dict[str, dict]:
    """Per time: on how many held-out pairs, ties left out, the order is that of PickScore(clean)."""
    label = spm.labels(pairs.clean)
    decided = pairs.rows(pairs.held_out & (label != 0.5))
    first = decided.clean.argmax(1)
    if not len(first):  # a few pairs, as at smoke scale: nothing can be said for the model
        return {str(t): {"pairs": 0, "verdict": spm.NO_GO} for t in model.times if t}
    plain = spm.TimeConditioning(base.model, model.times, len(model.adaptive)).to(base.device)  # untrained: PickScore
    found = {}
    for place in range(pairs.x.shape[2]):
        row = torch.full((len(first),), place)
        trained, lite = (_in_parts(m, base, decided, row).argmax(1) == first for m in (model, plain))
        found[str(model.times[place])] = {
            "pairs": len(first),
            "spm": round(trained.float().mean().item(), 4),
            "spm_lite": round(lite.float().mean().item(), 4),
            "gained": int((trained & ~lite).sum()),
            "lost": int((lite & ~trained).sum()),
            "verdict": spm.GO if (trained.sum() > lite.sum()) else spm.NO_GO,
        }
    return found


def _in_parts(model, base, pairs: Pairs, row: Tensor) -> Tensor:
    parts = [logits_of(model, base, pairs.rows(i), row[i]).cpu() for i in torch.arange(len(row)).split(BATCH)]
    return torch.cat(parts)


# ---- the job ----


def train(config: Config, model_name: str, hub: Hub, results: Path) -> dict:
    fit, entry = config.scale_entry.preference_model, config.models[model_name]
    if fit is None:
        raise ConfigError(f"scales.{config.scale}.preference_model is missing; it is needed to train one.")
    seed = config.scale_entry.seed
    chain = chain_for(model_name, entry, entry.tuned_steps)
    policy = load_policy(entry, hub, getattr(torch, config.scale_entry.dtype), speed=config.scale_entry.speed)
    cache = PairCache(config.scale, model_name, fit.data, results)
    base = load_metric("spm_lite", config.metrics["spm_lite"], hub, policy.device).base
    base.model.requires_grad_(False)
    pairs = look(policy, chain, cache, base, min(fit.num_pairs, len(cache)), seed)
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(seed, "preference model", "table"))
        model = spm.TimeConditioning(base.model, shown_times(chain, 0), fit.layers).to(policy.device)
    descend(model, base, pairs, fit, seed, (~pairs.held_out).nonzero()[:, 0])  # a copy of x would be as large again
    found = agreement(model, base, pairs)
    about = {"times": model.times, "layers": fit.layers, "agreement": found}
    path = hub.root / spm.REPOSITORY / file_name(model_name)
    with atomic(path) as part:
        state_dicts.write(part, {k: v.cpu() for k, v in model.state_dict().items()}, {"spm": json.dumps(about)})
    log.info("%s", ", ".join(f"t = {t}: {v['verdict']}" for t, v in found.items()))
    ties = (spm.labels(pairs.clean) == 0.5).float().mean().item()
    return {**about, "pairs": len(pairs.clean), "ties": round(ties, 4), "unet_forwards": policy.unet_forwards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("preference model"):
        config, meter = from_arguments(args), Meter()
        if args.model not in config.models:
            raise ConfigError(f"--model is {args.model!r}; expected one of {', '.join(config.models)}.")
        hub = Hub(hub_dir(config.scale, args.results))
        found = train(config, args.model, hub, args.results)
        meter.counts = {"unet_forwards": found.pop("unet_forwards")}
        settings = {
            "scale": config.scale,
            "model": {args.model: config.models[args.model].model_dump()},
            "preference_model": config.scale_entry.preference_model.model_dump(),
        }
        path = hub.root / f"preference_model_{args.model}.json"
        write_json(path, record("preference model", settings, hub.inputs(), meter, **found))


if __name__ == "__main__":
    main()

"""What a run trains on, by the format of its data set: a latent cache, the pictures of one subject, or prompts."""

from collections.abc import Callable

import torch
from torch import Tensor

from pso.caches import PairCache, load_prompt_set, pixels
from pso.checks import PAIRS
from pso.dreambooth import Subject, load_subject
from pso.embeddings import PairEmbeddings
from pso.entries import Config, MethodEntry
from pso.hub import Hub
from pso.policy import Conditioning, Policy
from pso.sources import Given
from pso.texts import KeptTexts
from pso.visits import reads_texts

VISITS = 64  # samples of each picture in an epoch; noise belongs to a sample, so none is twice in an update


class SubjectPictures:
    """The few pictures of a subject, encoded in memory, all with its one prompt. Targets alone, as PairCache has them.

    Sample i is picture i modulo their number.
    """

    inputs: list[dict] = []  # the hub remembers the files
    left_out: tuple[int, ...] = ()

    def __init__(self, policy: Policy, subject: Subject, encode: Callable[[list[str]], Conditioning]):
        pictures = pixels(policy, [path.read_bytes() for path in subject.images])
        self.mean, self.std = (v.cpu() for v in policy.encode_images(pictures))
        self.prompts = [subject.instance_prompt]
        self.encoded = encode(self.prompts)
        self.prompt_index = torch.zeros(VISITS * len(subject.images), dtype=torch.long)
        self.counts = {"subject": subject.name, "pictures": len(subject.images)}

    def __len__(self) -> int:
        return len(self.prompt_index)

    def latents(self, side: str, index: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and std of the posteriors [B, C, H, W], float32."""
        if side != "target":
            raise ValueError(f"side is {side!r}; a subject's pictures are targets, nothing stands against them")
        pictures = [i % len(self.mean) for i in index]
        return self.mean[pictures], self.std[pictures]

    def condition(self, device) -> Conditioning:
        """Text condition of the one prompt [1, ...]."""
        return Conditioning(self.encoded.hidden.to(device), self.encoded.pooled.to(device))


def give_data(given: Given, config: Config, model: str, method: MethodEntry, subject: str | None, hub: Hub, results):
    """Fill in what a run's source works from: pairs (or targets), prompts, their condition and embeddings."""
    name, policy = method.data, given.policy
    if reads_texts(config, method):
        given.texts = KeptTexts(config, model, hub, results)
    dataset, visits = config.datasets[name], method.tune.num_updates * method.tune.batch_size
    if dataset.format in PAIRS:
        given.pairs = PairCache(config.scale, model, name, results)
        if method.reward is None:  # else it works from the prompts
            given.pairs.require(given.seed, visits)
    elif dataset.format == "dreambooth":
        given.pairs = SubjectPictures(policy, load_subject(hub, dataset, name, subject), given.encoded)
    if given.pairs is None:
        given.prompts = [p.text for p in load_prompt_set(hub, dataset, name)]
        given.condition = given.texts.condition(given.prompts, policy.device)
        return
    given.prompts, given.condition = given.pairs.prompts, given.pairs.condition(policy.device)
    if method.embeddings is not None:
        given.embeddings = PairEmbeddings(config.scale, method.embeddings, name, given.pairs, results)
        given.embeddings.require(given.seed, visits, given.pairs.left_out)

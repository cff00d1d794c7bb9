"""What a LoRA inherits: the licences of all that its weights come from, by repositories.yaml. Torch-free.

A LoRA is a derivative of the weights that it was trained on, so their terms go with it. Where they are of one kind
that the Hub knows, that is its licence; everywhere else it is `other`, with a name that lists them and a link to the
strictest. A judge or a data set without a licence of its own is named, never guessed. Of a folder of the user's own
nothing is known: where its terms are the strictest there is nothing to link to.
"""

import re
from dataclasses import dataclass

from pso.entries import Config, MethodEntry, ModelEntry, is_outside, told_folder
from pso.provenance import UserError
from pso.remote import Repository
from pso.steps import metric_repositories

IDS = {  # as repositories.yaml says it -> the Hub's id
    "CreativeML Open RAIL++-M": "openrail++",
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
}
NOTICE_ONLY = ("MIT", "Apache-2.0")  # ask for their notice and restrict nothing
KNOWN = (*IDS.values(), "other")
UNSTATED = "unstated"  # where a repository says nothing
UNKNOWN = "unknown"  # where we say nothing of it


@dataclass(frozen=True)
class Source:
    """One repository behind a LoRA."""

    role: str
    repo: str
    licence: str
    non_commercial: bool = False
    page: str | None = None
    dataset: bool = False  # a data set of the Hub
    weights: bool = False  # the LoRA was trained on its weights

    @property
    def outside(self) -> bool:
        """Whether it is a folder of the user's own."""
        return is_outside(self.repo)


def sources(config: Config, model: ModelEntry, method: MethodEntry, data: str) -> list[Source]:
    """Every repository that a run's LoRA comes from, weights first; data: the repository that its run.json names."""
    roles = [("base model", model.base)]
    roles += [("UNet", model.unet.repo)] if model.unet else []
    roles += [("difference of UNets", repo) for delta in model.deltas for repo in (delta.repo, delta.minus)]
    roles += [("LoRA below this one", lora.repo) for lora in model.loras]
    weights = [_source(config, role, repo, weights=True) for role, repo in dict.fromkeys(roles)]
    more = [("VAE", model.vae)] if model.vae else []
    more += [("VAE that training rewards look through", model.preview_vae)] if model.preview_vae else []
    more += [("training data", data)]
    judges = [("training reward", method.reward), ("embeddings of the training pairs", method.embeddings)]
    more += [(role, repo) for role, name in judges if name for repo in metric_repositories(config, name)]
    return [*weights, *(_source(config, role, repo) for role, repo in dict.fromkeys(more))]


def _source(config: Config, role: str, repo: str, weights: bool = False) -> Source:
    try:
        found = Repository.of(config, repo)
    except UserError:  # no entry, so nothing is known of it
        return Source(role, told_folder(repo), UNKNOWN, weights=weights)
    entry = found.entry
    return Source(role, repo, entry.licence, entry.non_commercial, found.page, found.kind == "dataset", weights)


@dataclass(frozen=True)
class Licence:
    """As a card's metadata say it; name and link where the id is `other`, no link where nothing can be linked to."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def linked(self) -> bool:
        return self.name is None or self.link is not None


def inherited(found: list[Source]) -> Licence:
    """Of weights all terms hold that restrict anything; of data and judges those that exclude commercial use."""
    held = [source for source in found if source.weights or source.non_commercial]
    binding = [source for source in held if source.licence not in NOTICE_ONLY] or held
    terms = list(dict.fromkeys(source.licence for source in binding))
    if len(terms) == 1 and terms[0] in IDS and not any(source.non_commercial for source in held):
        return Licence(IDS[terms[0]])
    strictest = max(binding, key=lambda source: (source.non_commercial, source.licence not in IDS))
    name = "-and-".join(re.sub(r"[^a-z0-9.+-]+", "-", licence.lower()).strip("-") for licence in terms)
    page = None if strictest.outside else strictest.page or f"https://huggingface.co/{strictest.repo}"
    return Licence("other", name, page)


def sentence(source: Source) -> str:
    """What is known of a repository's terms."""
    if source.outside:
        return "unknown: a folder of its maker's own"
    if source.licence == UNKNOWN:
        return "unknown: repositories.yaml has no entry of it"
    if source.licence.startswith(UNSTATED):
        return "none stated by its owners, so nothing is known to be allowed"
    return f"{source.licence}{' (**no commercial use**)' if source.non_commercial else ''}"

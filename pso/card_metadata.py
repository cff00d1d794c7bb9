"""The head of a model card as the Hub reads it, and whether it is one. Torch-free, and without the network.

`RepoCard.validate` of huggingface_hub asks the Hub; what can be said here is said by its parser and by the rules below.
"""

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pso.licences import KNOWN, Licence, Source

LIBRARY, PIPELINE = "diffusers", "text-to-image"
RELATION = "adapter"
FAMILY = "stable-diffusion-xl"
FEW_STEPS = 8  # a sampler of at most so many is called few-step


def metadata(
    name: str, found: list[Source], licence: Licence, tags: list[str], results: list[EvalResult], **more: str
) -> ModelCardData:
    bases = base_models(found)
    return ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=RELATION,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        datasets=[source.repo for source in found if source.dataset] or None,
        tags=["lora", FAMILY, *tags],
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )


def base_models(found: list[Source]) -> list[str]:
    """What of the Hub the LoRA goes onto, the pipeline first."""
    return list(dict.fromkeys(source.repo for source in found if source.weights and not source.outside))


def problems(text: str, bases: list[str], linked: bool = True) -> list[str]:
    """What is wrong with a card's metadata, each as the end of a sentence about the card; bases: of the run; linked:
    whether there is an address of its terms."""
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:  # no YAML, or no model-index
        return [f"has metadata that huggingface_hub cannot read ({' '.join(str(error).split())[:200]})"]
    data, found = card.data, []
    named = data.base_model or []
    named = named if isinstance(named, list) else [named]
    expected = {
        "base_model": (named, bases),
        "base_model_relation": (data.get("base_model_relation"), RELATION),
        "library_name": (data.library_name, LIBRARY),
        "pipeline_tag": (data.pipeline_tag, PIPELINE),
    }
    found += [f"has {key} {has!r}; expected {wanted!r}" for key, (has, wanted) in expected.items() if has != wanted]
    found += [f"has base_model {base!r}, which is no repository's id" for base in named if not _is_id(base)]
    if data.license not in KNOWN:
        found.append(f"has license {data.license!r}; expected one of {', '.join(KNOWN)}")
    if data.license == "other" and not (_text(data.license_name) and (_link(data.license_link) or not linked)):
        found.append("has license 'other' without license_name and a license_link that is an https address")
    if not {"lora", FAMILY} <= set(data.tags or []):
        found.append(f"has tags {data.tags!r}; expected lora and {FAMILY} among them")
    if not card.text.strip():
        found.append("says nothing below its metadata")
    return found


def _is_id(repo: object) -> bool:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _link(value: object) -> bool:
    return _text(value) and str(value).startswith("https://")

"""Which files of a repository are fetched: globs, of which some name alternatives, and variants. Torch-free."""

import re
from collections import defaultdict
from fnmatch import fnmatchcase

from pso.provenance import UserError
from pso.remote import File, Repository, Snapshot

PICKLES = {"pytorch_model.bin": "model*.safetensors"}  # needed only where there is no file of the second kind
TOKENIZER_EXTRAS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # made from the vocabulary
VARIANT = re.compile(r"(.+?)\.(\w+)((?:-\d+-of-\d+)?\.(?:safetensors|bin))")  # x.fp16.safetensors of x.safetensors


def chosen(repository: Repository, snapshot: Snapshot) -> list[File]:
    """The files that an entry's globs name, in the order of their paths.

    `*` goes across folders, as in huggingface_hub's allow_patterns. A glob that fits nothing is an error, unless it is
    the pickle of weights that are there as safetensors, or a file that a tokenizer does without.
    """
    fits = {glob: [f for f in snapshot.files if fnmatchcase(f.path, glob)] for glob in repository.entry.files}
    for glob, found in fits.items():
        folder, _, name = glob.rpartition("/")
        better = f"{folder}/{PICKLES[name]}".lstrip("/") if name in PICKLES else None
        if better is not None and fits.get(better):
            fits[glob] = []
        elif not found and not _has_alternative(glob, fits):
            if not snapshot.whole:
                raise repository.offline(glob)
            raise UserError(
                f"{repository.name} has no file {glob} at commit {snapshot.commit[:7]}; correct "
                f"repositories.{repository.name}.files or .revision."
            )
    found = {file.path: file for files in fits.values() for file in files}
    return sorted(_of_variant(list(found.values()), repository.entry.variant), key=lambda file: file.path)


def _has_alternative(glob: str, fits: dict[str, list[File]]) -> bool:
    folder, _, name = glob.rpartition("/")
    pickles = [f"{folder}/{pickle}".lstrip("/") for pickle, better in PICKLES.items() if name == better]
    return name in TOKENIZER_EXTRAS or any(fits.get(pickle) for pickle in pickles)


def _of_variant(files: list[File], variant: str | None) -> list[File]:
    """Of a file that lies there in several variants the one asked for, else the plain one."""
    variants: dict[str, dict[str | None, list[File]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        match = VARIANT.fullmatch(file.path)
        plain = match[1] + match[3] if match else file.path
        key = re.sub(r"-\d+-of-\d+(?=\.\w+$)", "", plain)  # however many parts a variant has
        variants[key][match[2] if match else None].append(file)
    kept = []
    for found in variants.values():
        best = next((name for name in (variant, None) if name in found), None)
        kept += found[best] if best in found else [file for each in found.values() for file in each]
    return kept

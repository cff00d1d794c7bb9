"""A published repository's files into the hub folder of a scale that takes the real ones. Torch-free.

    python -m pso.fetch --repo owner/name

The files lie in huggingface_hub's cache and are linked into results/{scale}/hub/owner/name/. The step file
results/{scale}/hub/repositories/{owner}--{name}.json says which they are; it holds nothing that two fetches of the
same files differ in, so that fetching again makes no later job stale.
"""

import argparse
from pathlib import Path

from pso.chosen import chosen
from pso.config import add_arguments, from_arguments
from pso.download import fetch_all, link
from pso.entries import Config
from pso.hub import hub_dir
from pso.lockfile import LOCK, write_once
from pso.paths import RESULTS
from pso.provenance import UserError, sentences, write_json
from pso.remote import Repository, snapshot_of
from pso.steps import slug


def fetch(config: Config, name: str, results: Path = RESULTS, lock: Path = LOCK) -> Path:
    """The step file of a repository whose files are in the hub folder."""
    if config.scale_entry.hub != "fetched":
        raise UserError(
            f"scale {config.scale} fetches nothing, its hub is made by the workflow; name a scale that does, as "
            '--set \'{"scale": "paper"}\'.'
        )
    repository = Repository.of(config, name)
    say_licence(repository)
    pinned = repository.revision(lock)  # before asking: what another process writes meanwhile holds for us too
    snapshot = snapshot_of(repository, lock)
    if pinned is None:
        commit = write_once(name, snapshot.commit, lock)
        say(f"{name}: newest commit {snapshot.commit} looked up and written to {lock}")
        if commit != snapshot.commit:  # another process was faster
            snapshot = snapshot_of(repository, lock)
    files = chosen(repository, snapshot)
    say(f"{name}: commit {snapshot.commit}, {len(files)} files, {sum(f.size for f in files) / 1e9:.2f} GB")
    places = fetch_all(repository, snapshot, files, say)
    put(hub_dir(config.scale, results) / name, {path: place for path, (place, _) in places.items()})
    step = hub_dir(config.scale, results) / "repositories" / f"{slug(name)}.json"
    content = {
        "schema_version": 1,
        "job": "fetch",
        "repo": name,
        "source": repository.entry.source,
        "revision": snapshot.commit,
        "licence": repository.entry.licence,
        "non_commercial": repository.entry.non_commercial,
        "files": [{"file": f.path, "size": f.size, "sha256": places[f.path][1]} for f in files],
    }
    write_json(step, content)
    return step


def put(folder: Path, places: dict[str, Path]) -> None:
    """Links to exactly these files; links of an earlier fetch to others go away."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, place in places.items():
        link(place.absolute(), folder / path)
    stale = [p for p in folder.rglob("*") if p.is_symlink() and str(p.relative_to(folder)) not in places]
    for path in stale:
        path.unlink()
    if stale:
        say(f"{len(stale)} links to files that are not asked for any more were removed")


def say_licence(repository: Repository) -> None:
    say(f"{repository.name}: licence {repository.entry.licence}")
    if repository.entry.non_commercial:
        say(f"{repository.name}: NON-COMMERCIAL USE ONLY, by its licence; read it at {repository.page}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--repo", required=True, help="owner/name, as in repositories.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("fetch"):
        fetch(from_arguments(args), args.repo, args.results)


if __name__ == "__main__":
    main()

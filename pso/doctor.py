"""Whether a scale can run here: what its repositories answer, disk, GPUs, tokens and packages. Go or no-go.

    python -m pso.doctor --set '{"scale": "paper"}'      or: snakemake doctor --config scale=paper
    python -m pso.doctor --pin                           write every commit that is not fixed yet into hub.lock.json
    python -m pso.doctor --why RUN                       which setting or code has changed since a run was made
    python -m pso.doctor --cost [TABLE ...]              what tables will cost
    python -m pso.doctor --progress                      how far all runs, images and scores are

Nothing is fetched. The exit code is 0 for go and 1 for no-go.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from tabulate import tabulate

from pso.campaign import works
from pso.chosen import chosen
from pso.config import add_arguments, from_arguments
from pso.download import cached, missing_bytes
from pso.entries import Config
from pso.estimate import disk_gb
from pso.hub import again, hub_dir, lost_files
from pso.lockfile import LOCK, write_once
from pso.machine import Finding, disk, gpus, own_data, packages
from pso.paths import RESULTS, scale_dir
from pso.provenance import UserError, sentences
from pso.remote import Refusal, Repository, Snapshot
from pso.steps import needed, published_entry, slug

TRIES = 2  # of a question to a server: a doctor does not wait for long
AT_ONCE = 8
GOOD = ("cached", "reachable")
STANDIN_BYTES = 2e9  # weights, pictures and scores of a stand-in world; stated, not measured


@dataclass
class Row:
    """One repository; sizes are those of its entry until its files are known."""

    repo: str
    needs: list[str]
    licence: str
    state: str
    revision: str
    size: float
    to_fetch: float
    known: bool = False  # whether the sizes are those of its files
    problem: str | None = None


# ---- repositories ----


def look(config: Config, name: str, needs: list[str], lock: Path = LOCK, results: Path = RESULTS) -> Row:
    """What a repository answers, without asking where everything is cached."""
    repository = Repository.of(config, name)
    entry, revision = repository.entry, repository.revision(lock)
    licence = f"NON-COMMERCIAL: {entry.licence}" if entry.non_commercial else entry.licence
    told = "would be looked up" if revision is None else f"{'pinned' if entry.revision else 'lock'} {revision[:7]}"
    row = Row(name, needs, licence, "", told, entry.size_gb * 1e9, entry.size_gb * 1e9)
    try:
        snapshot = repository.kept(revision)
        if snapshot is None or not _measured(row, repository, snapshot):
            snapshot = repository.ask(revision, TRIES)
            _measured(row, repository, snapshot)
            if snapshot.gated:
                repository.check_access()
            row.state = "reachable"
        _check_step(repository, snapshot, results)
        if revision is None:
            row.revision += f" ({snapshot.commit[:7]})"
    except Refusal as refusal:
        row.state, row.problem = refusal.state, str(refusal)
    except UserError as error:
        row.state, row.problem = "wrong entry", str(error)
    return row


def _check_step(repository: Repository, snapshot: Snapshot, results: Path) -> None:
    """Snakemake makes a step anew when the entry changes, but sees neither the lock file nor the cache."""
    name, hub = repository.name, hub_dir(repository.config.scale, results)
    step = hub / "repositories" / f"{slug(name)}.json"
    if not step.is_file():
        return
    told, command = json.loads(step.read_text()), again("fetch", name, repository.config.scale)
    if (made := told["revision"]) != snapshot.commit:
        raise Refusal(
            "fetched at another commit",
            f"{name} was fetched at commit {made[:7]} and is now to be {snapshot.commit[:7]}; {command} fetches it, "
            "and the workflow then makes anew what comes of it, or write the former commit into the entry's revision.",
        )
    if lost := lost_files(told, hub / name):
        raise Refusal(
            "fetched, then lost",
            f"{name} was fetched and has no {lost[0]} any more ({len(lost)} of {len(told['files'])} files are gone); "
            f"{command} puts them there again.",
        )


def _measured(row: Row, repository: Repository, snapshot: Snapshot) -> bool:
    """Whether all files of a snapshot are cached; their sizes go into the row."""
    files = chosen(repository, snapshot)
    row.known, row.size = True, float(sum(file.size for file in files))
    row.to_fetch = float(missing_bytes(repository, snapshot, files))
    row.state = "cached"
    return all(cached(repository, snapshot, file) for file in files)


def look_at_all(config: Config, lock: Path = LOCK, results: Path = RESULTS) -> list[Row]:
    """Every repository that the tables asked for need; several are asked at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda item: look(config, *item, lock, results), needed(config).items()))


def pin(config: Config, say: Callable[[str], None], lock: Path = LOCK) -> None:
    """Every needed repository's commit in the lock file; those that do not answer are left to the table."""
    for name in needed(config):
        repository = Repository.of(config, name)
        if repository.revision(lock) is None:
            try:
                commit = write_once(name, repository.ask(None, TRIES).commit, lock)
            except UserError:
                continue
            say(f"{name}: commit {commit} written to {lock}")


def table(rows: list[Row]) -> str:
    header = ["repository", "needed by", "state", "licence", "size", "to fetch", "revision"]
    lines = [
        [
            row.repo,
            _grouped(row.needs),
            row.state,
            row.licence,
            _size(row.size, row),
            _size(row.to_fetch, row),
            row.revision,
        ]
        for row in rows
    ]
    return tabulate(lines, header, "simple", disable_numparse=True, colalign=("left",) * 4 + ("right",) * 2 + ("left",))


def _grouped(needs: list[str]) -> str:
    """`model a`, `model b`, `data c` as: model a, b; data c. Of more than two only the number."""
    kinds: dict[str, list[str]] = {}
    for need in needs:
        kind, _, name = need.partition(" ")
        kinds.setdefault(kind, []).append(name)
    return "; ".join(f"{len(n)} {k}s" if len(n) > 2 else f"{k} {', '.join(n)}" for k, n in kinds.items())


def _size(num_bytes: float, row: Row) -> str:
    """With ~ in front where it is the entry's, and the files could not be seen."""
    if num_bytes >= 1e8:
        return f"{'' if row.known else '~'}{num_bytes / 1e9:.2f} GB"
    return f"{'' if row.known else '~'}{num_bytes / 1e6:.1f} MB"


# ---- the rest ----


def tokens() -> str:
    """Names of tokens and whether they are there; never what they are."""
    found = {name: bool(os.environ.get(name)) for name in ("HF_TOKEN", "GITHUB_TOKEN")}
    words = [f"{name} {'set' if there else 'not set'}" for name, there in found.items()]
    return ", ".join([*words, f"token file {'there' if Path(constants.HF_TOKEN_PATH).is_file() else 'not there'}"])


def disk_needs(config: Config, rows: list[Row], results: Path) -> list[tuple[str, Path, float]]:
    """What, where, bytes."""
    if config.scale_entry.hub == "standin":
        return [("stand-in world", scale_dir(config.scale, results), STANDIN_BYTES)]
    if config.scale_entry.hub == "random":
        small = config.scale_entry.random.sizes == "small"
        entries = [published_entry(config, name) for name in needed(config)]
        need = STANDIN_BYTES if small else sum(e.size_gb for e in entries if e.source == "hub_model") * 1e9
        return [("weights drawn at random", scale_dir(config.scale, results), need)]
    made = 1e9 * sum(sum(disk_gb(item).values()) - item.gb for item in works(config))
    folder = scale_dir(config.scale, results)
    there = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [
        ("files to fetch", Path(constants.HF_HUB_CACHE), sum(row.to_fetch for row in rows)),
        ("latents, images and LoRAs", folder, max(made - there, 0)),
    ]


def examine(config: Config, args: argparse.Namespace) -> list[str]:
    """Print everything; the reasons against a start."""
    fetched = config.scale_entry.hub == "fetched"
    rows: list[Row] = []
    if fetched and args.pin:
        pin(config, print)
    if fetched:
        rows = look_at_all(config, LOCK, args.results)
        print(table(rows), "\n")
    else:
        print(f"scale {config.scale} fetches nothing: the workflow makes its weights and data.\n")
    findings = [*disk(disk_needs(config, rows, args.results)), *gpus(config, args.gpu_elsewhere), *packages()]
    findings += own_data(config)
    if fetched:
        findings.append(Finding("tokens", "where a repository is gated", tokens()))
    lines = [[f.what, f.need, f.there, "" if f.reason is None else "missing"] for f in findings]
    print(tabulate(lines, ["here", "need", "there", ""], "simple", disable_numparse=True), "\n")
    problems = [row for row in rows if row.state not in GOOD]
    print("".join(f"- {line}\n" for line in _sentences(problems)), end="\n" if problems else "")
    return [*_states(problems), *(f.reason for f in findings if f.reason is not None)]


def _sentences(problems: list[Row]) -> list[str]:
    """Each different sentence once, with the number of other repositories of which it is true."""
    same: dict[str, list[str]] = {}
    for row in problems:
        same.setdefault(str(row.problem).replace(row.repo, ""), []).append(str(row.problem))
    return [found[0] + (f" (The same of {len(found) - 1} more.)" if found[1:] else "") for found in same.values()]


def _states(problems: list[Row]) -> list[str]:
    """`owner/name is gone`; of more than two in the same state only the number."""
    states: dict[str, list[str]] = {}
    for row in problems:
        states.setdefault(row.state, []).append(row.repo)
    return [f"{', '.join(n) if len(n) < 3 else f'{len(n)} repositories'}: {state}" for state, n in states.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pin", action="store_true", help="write every unset revision into hub.lock.json")
    parser.add_argument("--gpu-elsewhere", action="store_true", help="the GPUs are on other machines, as of a cluster")
    parser.add_argument("--why", type=Path, metavar="RUN", help="what has changed since this run was made")
    parser.add_argument("--cost", nargs="*", metavar="TABLE", help="what these tables, or all asked for, will cost")
    parser.add_argument("--progress", action="store_true", help="how far all runs, images and scores are")
    args = parser.parse_args()
    with sentences("doctor"):
        config = from_arguments(args)
        if args.progress:
            from pso import progress

            print(progress.text(config, args.results), end="")
            return
        if args.why is not None:
            from pso import why

            print(why.text(config, args.why, args.results))
            return
        if args.cost is not None:
            from pso import estimate

            print(estimate.text(config, args.cost))
            return
        reasons = examine(config, args)
    print(f"NO-GO: {'; '.join(reasons)}" if reasons else f"GO: scale {config.scale} can start")
    sys.exit(1 if reasons else 0)


if __name__ == "__main__":
    main()

"""Files by repository id: the one door to weights and data.

A hub is a folder that holds repositories under their real ids and file names. The stand-in hub of the small scales
is such a folder, made by `pso.miniature`, another is filled with published files by `pso.fetch`; loaders cannot tell
one from the other. A data set may also lie in a folder of the user's own, outside of any hub.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from pso.entries import DatasetEntry, is_outside
from pso.paths import RESULTS, scale_dir
from pso.provenance import UserError, sha256_of


def hub_dir(scale: str, results: Path = RESULTS) -> Path:
    return scale_dir(scale, results) / "hub"


def recorded(entry: DatasetEntry) -> dict:
    """The entry for run.json, which tells of a folder of the user's own only the name."""
    return entry.model_dump() | {"repo": name_of(entry.repo)}


def name_of(repo: str) -> str:
    """As the inputs of a record call a repository, or a folder of the user's own."""
    return Path(repo).resolve().name if is_outside(repo) else repo


def lost_files(step: dict, folder: Path) -> list[str]:
    """Files that a step file tells of and that its repository's folder has no more."""
    return [told["file"] for told in step["files"] if not (folder / told["file"]).is_file()]


def again(job: str, repo: str, scale: str) -> str:
    """The command that makes a step anew. Removing its file would not: Snakemake misses nothing whose results are
    there."""
    return f"""`python -m pso.{job} --repo {repo} --set '{{"scale": "{scale}"}}'`"""


class Hub:
    """Looks up files and remembers what was used, for run.json."""

    def __init__(self, root: Path, command: str = "snakemake hub"):
        self.root, self.command = Path(root), command
        self.used: dict[tuple[str, str, str], Path] = {}  # name, file, folder: two folders may have one name
        self._whole: set[str] = set()  # repositories whose fetched files are all there

    def repo(self, repo: str) -> Path:
        """The folder of a repository."""
        path = self._place(repo)
        if not path.is_dir() and is_outside(repo):
            raise UserError(f"{repo} is not a folder; correct its `repo` in the configuration, or mount what it names.")
        if not path.is_dir():
            raise UserError(f"repository {repo} is not in the hub {self.root}; `{self.command}` makes it.")
        self._check_whole(repo)
        return path

    def _check_whole(self, repo: str) -> None:
        """What was fetched is a link into the cache, which may have been emptied; Snakemake does not see that."""
        if repo in self._whole or not (step := self._step(repo)).is_file():
            return
        told = json.loads(step.read_text())
        if lost := lost_files(told, self.root / repo):
            raise UserError(
                f"{repo} in the hub {self.root} has no {lost[0]} any more ({len(lost)} of {len(told['files'])} files "
                f"are gone); {again(told['job'], repo, self.root.parent.name)} puts them there again."
            )
        self._whole.add(repo)

    def _step(self, repo: str) -> Path:
        return self.root / "repositories" / f"{repo.replace('/', '--')}.json"

    def file(self, repo: str, name: str) -> Path:
        path = self.repo(repo) / name
        if not path.is_file():
            raise UserError(f"{repo} has no file {name}{self._where(repo)}")
        self.read(repo, [path])
        return path

    def files(self, repo: str, pattern: str) -> list[Path]:
        """Every file that fits a glob, in the order of their names."""
        found = sorted(self.repo(repo).glob(pattern))
        if not found:
            raise UserError(f"{repo} has no file {pattern}{self._where(repo)}")
        self.read(repo, found)
        return found

    def folder(self, repo: str, name: str) -> Path:
        """A folder of a repository; what is read of it is told to `read`."""
        path = self.repo(repo) / name
        if not path.is_dir():
            raise UserError(f"{repo} has no folder {name}{self._where(repo)}")
        return path

    def read(self, repo: str, paths: Iterable[Path]) -> None:
        """Remember files of a repository that were found by other means."""
        name, place = name_of(repo), self._place(repo)
        self.used |= {(name, str(path.relative_to(place)), str(place)): path for path in paths}

    def _where(self, repo: str) -> str:
        """The end of a sentence about something that is not there."""
        if is_outside(repo):
            return "; put it there, or correct its name in the configuration."
        return f" in the hub {self.root}; `{self.command}` makes it."

    def _place(self, repo: str) -> Path:
        return Path(repo) if is_outside(repo) else self.root / repo

    def weights(self, repo: str, folder: str = "") -> list[Path]:
        """The safetensors files below a folder of a repository."""
        return self.files(repo, f"{folder}/**/*.safetensors" if folder else "**/*.safetensors")

    def inputs(self) -> list[dict]:
        """What was used: repository, file, sha256 and, of a fetched repository, its commit, for run.json."""
        return [self.told(repo, name, path) for (repo, name, _), path in sorted(self.used.items())]

    def told(self, repo: str, name: str, path: Path) -> dict:
        """Of a fetched file what was checked then, unless it was written since: 30 GB are not read for every job. Of
        another file, as a preference model of ours beside the published ones, nothing that was told of the fetch."""
        step = self._step(repo)
        if not step.is_file():
            return {"repo": repo, "file": name, "sha256": sha256_of(path)}
        fetched = json.loads(step.read_text())
        known = {f["file"]: f for f in fetched["files"]}.get(name)
        now, then = path.stat(), step.stat()
        same = known is not None and now.st_size == known["size"] and now.st_mtime_ns < then.st_mtime_ns
        if not same:
            return {"repo": repo, "file": name, "sha256": sha256_of(path)}
        return {"repo": repo, "file": name, "sha256": known["sha256"], "revision": fetched.get("revision")}

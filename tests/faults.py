"""Writes that fail, one after the other: every call by which jobs of the smoke scale write below the results folder.

    python tests/faults.py --all --out results/reliability/faults.json

tests/faults.c, put before libc, numbers the calls of a job and lets one fail (no room from then on, an input/output
error, half a write and then no room) or be short (half a write, the rest when asked again). Afterwards no file with a
final name may be partial, the job has to have said one sentence and failed, or to be done, and the same command without
the fault has to make what an undisturbed run makes.
"""

import argparse
import contextlib
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kills import ROOT, SLOW, settings, whole_run
from same import content, differing, made, unfinished
from warm import run, warm

from pso.checkpoint import NotWhole, _read
from pso.provenance import code_state, versions, write_json

KINDS = ("enospc", "eio", "short", "partial")
UNSIZED = ("enospc", "eio")
SIZED = ("write", "pwrite", "writev", "fwrite")  # calls that can be short
MODEL = ("--model", "sdxl_dmd2")
JOBS = {
    "latents": ("pso.caches", *MODEL, "--dataset", "pickapic_v2"),
    "texts": ("pso.texts", *MODEL),
    "tune": ("pso.tune", *MODEL, "--method", "pso_online"),
    "generate": ("eval.generate", *MODEL),
    "score": ("eval.score", *MODEL),
    "table": ("eval.tables", "--table", "table1"),
    "diff": ("eval.diff", "--table", "table1"),
    "claims": ("eval.claims",),
    "figures": ("eval.figures",),
    "cost": ("eval.cost",),
    "report": ("eval.report",),
    "cards": ("pso.card",),
}
MORE = ("clip_score", "aesthetic_score", "sharpness", "drift", "diversity", "sharpness_ratio")
ASKED = settings(("pso_online",), 4, 2, 1, (*SLOW, *MORE))  # scored by PickScore alone: as many writes as it takes
FEW = 40  # calls of a job that all fail in every way; of one with more each fails in one
OLD = b"of before\n"  # what a file held that the job writes anew
SHARED = ("hub", "published")  # the latter are runs behind repositories of the hub, which the cost of all jobs names


def library(folder: Path) -> Path:
    """tests/faults.c, compiled."""
    made = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"], check=True)
    return made


# ---- one job ----


@dataclass
class Stage:
    """A job with the folder that it finds, the one that it leaves undisturbed, and its calls, "name path" each."""

    job: str
    before: Path
    after: Path
    calls: list[str]

    @property
    def outputs(self) -> list[Path]:
        """Relative paths of what it writes."""
        here = set(made(base_of(self.before), SHARED))
        return [path for path in made(base_of(self.after), SHARED) if path not in here]

    def cases(self, drawn: random.Random) -> list[tuple[int, str]]:
        """Every call, counted from 1, with every way in which it can fail, or one of them where calls are many."""
        found = []
        for number, call in enumerate(self.calls, 1):
            kinds = KINDS if call.split()[0] in SIZED else UNSIZED
            found += [(number, kind) for kind in (kinds if len(self.calls) <= FEW else [drawn.choice(kinds)])]
        return found


def base_of(work: Path) -> Path:
    return work / "results" / "smoke"


class Jobs:
    """Runs jobs in the warm process, which has tests/faults.c before its libc."""

    def __init__(self, python: str, asked: dict):
        self.python = python
        self.given = {"PSO_BENCH_SETTINGS": json.dumps(asked), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(self, job: str, work: Path) -> tuple[int, str]:
        return run(self.python, list(JOBS[job]), work, **self.given)

    def with_fault(self, job: str, work: Path, call: int, kind: str) -> tuple[int, str]:
        told = {"FAULTS_FOLDER": str(work / "results"), "FAULTS_AT": str(call), "FAULTS_KIND": kind}
        return run(self.python, list(JOBS[job]), work, **self.given, **told)

    def calls(self, job: str, work: Path) -> list[str]:
        """Run undisturbed, with its calls written down."""
        with tempfile.NamedTemporaryFile("r") as trace:
            told = {"FAULTS_FOLDER": str(work / "results"), "FAULTS_TRACE": trace.name}
            code, said = run(self.python, list(JOBS[job]), work, **self.given, **told)
            if code != 0:
                raise RuntimeError(f"{job} failed undisturbed:\n{said}")
            return trace.read().splitlines()

    def stages(self, folder: Path, hub: Path, names: list[str]) -> Iterator[Stage]:
        """The jobs one after the other, each in a copy of what those before it left."""
        before = folder / "nothing"
        base_of(before).mkdir(parents=True)
        for name in SHARED:
            if (hub / name).exists():  # a hub that was made for tables without them has no published runs
                (base_of(before) / name).symlink_to(hub / name, target_is_directory=True)
        for name in JOBS:
            after = shutil.copytree(before, folder / name, symlinks=True)
            stage = Stage(name, before, after, self.calls(name, after))
            if name in names:
                yield stage
            before = after


# ---- one fault ----


def partial(work: Path, stage: Stage) -> list[str]:
    """Files with a final name that are neither as the job leaves them nor as they were, nor absent."""
    base, whole = base_of(work), base_of(stage.after)
    found = []
    for path in made(base, SHARED):
        if any(part.startswith(".") for part in path.parts):  # no final name
            continue
        now = (base / path).read_bytes()
        if now == OLD or is_of_a_whole_checkpoint(base / path):
            continue
        if path.name == "train.jsonl":  # grows line by line
            right = (whole / path).read_bytes().startswith(now) and now[-1:] in (b"", b"\n")
        else:
            with contextlib.suppress(ValueError):
                now = content(base / path)
            right = (whole / path).exists() and now == content(whole / path)
        if not right:
            found.append(str(path))
    return found


def is_of_a_whole_checkpoint(path: Path) -> bool:
    if path.parent.parent.name != "state":
        return False
    try:
        _read(path.parent)
    except NotWhole:
        return False
    return True


def problems(jobs: Jobs, stage: Stage, work: Path, call: int, kind: str) -> list[str]:
    """What is not as it should be after a fault, and after the same command without it."""
    code, said = jobs.with_fault(stage.job, work, call, kind)
    found = [f"partial: {name}" for name in partial(work, stage)]
    lines = said.strip().splitlines() or [""]
    if "Traceback" in said or code < 0:
        found.append(f"exit {code}, no sentence: {lines[-1]}")
    elif code == 0:
        found += [f"done, but not the same: {name}" for name in different(work, stage)]
    elif not lines[-1].endswith("run the same command again."):
        found.append(f"exit {code}, no advice: {lines[-1]}")
    again, said = jobs.run(stage.job, work)
    if again != 0:
        return [*found, f"again, exit {again}: {(said.strip().splitlines() or [''])[-1]}"]
    return found + [f"again, not the same: {name}" for name in different(work, stage)]


def different(work: Path, stage: Stage) -> list[str]:
    here, there = base_of(work), base_of(stage.after)
    return differing(here, there, SHARED) + [name for name in unfinished(here) if name not in unfinished(there)]


def one(jobs: Jobs, stage: Stage, folder: Path, case: tuple[int, str]) -> list[str]:
    """The problems of one fault, in a folder of its own; in every other one the job's files were there before."""
    (call, kind), old = case, case[0] % 2 == 0
    work = shutil.copytree(stage.before, folder / f"{stage.job}-{call}-{kind}", symlinks=True)
    for path in stage.outputs if old and stage.job not in ("latents", "texts") else []:
        (base_of(work) / path).parent.mkdir(parents=True, exist_ok=True)
        (base_of(work) / path).write_bytes(OLD)
    found = problems(jobs, stage, work, call, kind)
    shutil.rmtree(work)
    return [f"{stage.job}, {kind} at {stage.calls[call - 1]}: {problem}" for problem in found]


# ---- all of them ----


@dataclass
class Result:
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    cases: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inject(
    python: str, folder: Path, hub: Path, names: list[str], each: int | None, seed: int, cores: int
) -> Iterator[Result]:
    """Faults in so many calls of each of these jobs, in all if None; calls and kinds drawn by the seed. What was found
    so far, after each job."""
    jobs, result = Jobs(python, ASKED), Result()
    for stage in jobs.stages(folder, hub, names):
        drawn = random.Random(f"{seed}/{stage.job}")
        cases = stage.cases(drawn)
        cases = cases if each is None else drawn.sample(cases, min(each, len(cases)))
        result.calls[stage.job] = dict(Counter(call.split()[0] for call in stage.calls))
        result.cases[stage.job] = len(cases)
        began = time.monotonic()
        with ThreadPoolExecutor(cores) as pool:
            for found in pool.map(functools.partial(one, jobs, stage, folder), cases):
                result.problems += found
                print(*found, sep="\n", end="\n" if found else "", flush=True)
        print(f"{stage.job}: {len(stage.calls)} calls, {len(cases)} faults, {time.monotonic() - began:.0f} s, "
              f"{len(result.problems)} problems so far", flush=True)  # fmt: skip
        yield result


def others(path: Path, names: list[str]) -> dict:
    """What was written before of other jobs and the same code: hours of one job after the other need not be one run."""
    nothing = {"calls": {}, "faults": {}, "problems": [], "seconds": 0}
    told = json.loads(path.read_text()) if path.exists() else nothing
    if told.get("code") != code_state() or set(names) & set(told["calls"]):
        return nothing
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every call; else --each of every job")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--hub", type=Path, help="a results/smoke whose hub is there; default: it is made")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pso") as name, contextlib.ExitStack() as stack:
        folder = Path(name).resolve()
        python = stack.enter_context(warm(LD_PRELOAD=str(library(folder))))
        hub = args.hub or whole_run(folder / "hub", None, ASKED, args.cores, python).base
        each = None if args.all else args.each
        before = others(args.out, args.jobs)
        for found in inject(python, folder, hub.resolve(), args.jobs, each, args.seed, args.cores):
            told = {"calls": before["calls"] | found.calls, "faults": before["faults"] | found.cases}
            told |= {"problems": before["problems"] + found.problems, "kinds": KINDS, "seed": args.seed}
            told |= {"seconds": before["seconds"] + round(time.monotonic() - began)}
            write_json(args.out, told | {"code": code_state(), "versions": versions()})
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    main()

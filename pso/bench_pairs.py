"""Preference pairs at the size of Pick-a-Pic v2: counts, time and memory of the index, and a conversion that is killed.

    python -m pso.bench pairs

The set is synthetic, in the true schema: tiny JPEGs, 851,293 decided rows, 58,960 different captions. The index and
the conversion run in processes of their own, so that their peak memory is their own.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pso.data import PAIR_SCHEMA
from pso.entries import DatasetEntry
from pso.pairs import iter_pairs
from pso.provenance import UserError
from pso.visits import Plan, kept_pairs

ROWS, PAIRS, PROMPTS = 959_040, 851_293, 58_960  # of Pick-a-Pic v2
VISITS = 5000 * 64  # of Offline-PSO
SIDE = 16  # px
POOL = 64  # different pictures
GROUP = 1000  # rows in a row group
LIMIT_GIB = 2.0
NAME = "synthetic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the set")
    parser.add_argument("--shards", type=int, default=64, help="files of the set")
    parser.add_argument("--converted", type=int, default=6000, help="visits whose pictures are read and encoded")
    parser.add_argument("--folder", type=Path, help="where the set is written (default: a temporary folder)")


# ---- the set ----


def sizes(rows: int) -> tuple[int, int]:
    """Decided pairs and captions: the published numbers, of a smaller set the same shares."""
    return (PAIRS, PROMPTS) if rows >= ROWS else (rows * PAIRS // ROWS, rows * PROMPTS // ROWS)


def entry_of(rows: int) -> DatasetEntry:
    pairs, prompts = sizes(rows)
    return DatasetEntry(
        format="preference_parquet", repo="bench/pairs", files="data/train-*.parquet", num_rows=rows, num_pairs=pairs,
        num_prompts=prompts,
    )  # fmt: skip


def pictures() -> list[bytes]:
    rng, found = np.random.default_rng(0), []
    for _ in range(POOL):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "JPEG")
        found.append(file.getvalue())
    return found


def write_set(folder: Path, rows: int, shards: int) -> None:
    """Shards in the true schema. Which rows are ties, who wins and who has which caption is drawn."""
    rng, (num_pairs, num_prompts), pool = np.random.default_rng(1), sizes(rows), pictures()
    decided = np.zeros(rows, bool)
    decided[rng.permutation(rows)[:num_pairs]] = True
    label = np.where(decided, rng.integers(0, 2, rows).astype(float), 0.5)
    caption = rng.integers(0, num_prompts, rows)
    caption[decided] = rng.permutation(np.arange(num_pairs) % num_prompts)  # every one of them in a decided row
    shown = rng.integers(0, POOL, (2, rows))
    (folder / "data").mkdir(parents=True)
    for shard in range(shards):
        part = slice(shard * rows // shards, (shard + 1) * rows // shards)
        columns = {
            "caption": [f"a synthetic caption, number {number:05d} of its kind" for number in caption[part]],
            "label_0": label[part],
            "label_1": 1 - label[part],
            "ranking_id": np.arange(rows)[part],
            **{f"jpg_{side}": [pool[k] for k in shown[side, part]] for side in (0, 1)},
        }
        count = len(columns["caption"])
        arrays = [pa.array(columns.get(c.name, [None] * count), c.type) for c in PAIR_SCHEMA]
        path = folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet"
        named = [c.name for c in PAIR_SCHEMA if not c.name.startswith("jpg_")]  # each picture is written out
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=PAIR_SCHEMA),
            path,
            row_group_size=GROUP,
            use_dictionary=named,
            compression="NONE",
        )


# ---- what is measured, each in a process of its own ----


def peak_gib() -> float:
    """Of this process since it started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20, 3)


def index(folder: Path, rows: int) -> dict:
    began = time.perf_counter()
    pairs = iter_pairs((folder / "data").glob("*.parquet"), entry_of(rows), NAME)  # stops where a count is wrong
    indexed = time.perf_counter()
    visits = min(VISITS, len(pairs) // 2)
    kept = kept_pairs(Plan({0: visits}), len(pairs), pairs.left_out)
    planned = time.perf_counter()
    return {
        "counts": pairs.counts.as_dict(),
        "index_s": round(indexed - began, 2),
        "rows_per_s": round(rows / (indexed - began)),
        "visits": visits,
        "visited_pairs": int(kept.sum()),
        "plan_s": round(planned - indexed, 2),
        "peak_rss_gib": peak_gib(),
    }


def conversion(folder: Path, rows: int, visits: int) -> dict:
    """The latents' own conversion with mean and spread of small squares for an encoder. One line for each batch."""
    import torch

    from pso.parts import convert

    encoded = []

    def encode(some: list) -> dict[str, torch.Tensor]:
        encoded.extend(visit.position for visit in some)
        print(len(encoded), flush=True)
        found = {}
        for k, side in enumerate(("target", "reference")):
            images = torch.from_numpy(np.stack([visit.pictures[k] for visit in some])).permute(0, 3, 1, 2).float()
            squares = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)
            found |= {f"{side}_mean": squares.mean(-1), f"{side}_std": squares.std(-1)}
        return found

    began = time.perf_counter()
    pairs = iter_pairs((folder / "data").glob("*.parquet"), entry_of(rows), NAME)
    places, parts = convert(pairs, Plan({0: visits}), folder / "parts", "bench", np.asarray, encode, 64)
    seconds = time.perf_counter() - began
    kept = np.flatnonzero(places[:, 0] >= 0)
    return {"encoded": encoded, "kept": kept.tolist(), "parts": parts, "seconds": seconds, "peak_rss_gib": peak_gib()}


def started(what: str, folder: Path, rows: int, *more: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "pso.bench_pairs", what, str(folder), str(rows), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> dict:
    output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"a measuring process ended with code {process.returncode}; what it said stands above.")
    return json.loads(output.splitlines()[-1])


def killed(process: subprocess.Popen, parts: Path, enough: int) -> None:
    """Killed without warning when it has written so many parts and is busy with the next."""
    for _ in process.stdout:
        if len(list(parts.glob("[!.]*.safetensors"))) >= enough:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def interrupted(folder: Path, rows: int, visits: int, shards: int) -> dict:
    """A conversion killed in its middle, gone on with, and one in a go: the same parts, nothing encoded twice."""
    parts = folder / "parts"
    killed(started("conversion", folder, rows, visits), parts, shards // 2)
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("[!.]*.safetensors")}
    second = finished(started("conversion", folder, rows, visits))
    untouched = all((parts / name).stat().st_mtime_ns == written for name, written in kept.items())
    parts.rename(folder / "parts_of_two")
    whole = finished(started("conversion", folder, rows, visits))
    again = sorted(set(second["kept"]) - set(second["encoded"]))  # what the first one has left
    return {
        "pairs": len(whole["kept"]),
        "kept_of_the_killed": len(again),
        "encoded_after_it": len(second["encoded"]),
        "parts_kept": len(kept),
        "parts": len(whole["parts"]),
        "nothing_twice": untouched and len(again) + len(second["encoded"]) == len(second["kept"]),
        "same_as_in_one_go": (second["parts"], second["kept"]) == (whole["parts"], whole["kept"]),
        "pairs_per_s": round(len(whole["kept"]) / whole["seconds"]),
        "peak_rss_gib": whole["peak_rss_gib"],
    }


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        write_set(folder, args.rows, args.shards)
        written = time.perf_counter() - began
        size = sum(path.stat().st_size for path in (folder / "data").iterdir())
        found = finished(started("index", folder, args.rows))
        figures = {
            "command": f"python -m pso.bench pairs --rows {args.rows} --shards {args.shards}",
            "set": {"rows": args.rows, "shards": args.shards, "gb": round(size / 1e9, 2), "write_s": round(written, 1)},
            "index": found,
            "conversion": interrupted(folder, args.rows, args.converted, args.shards),
        }
    check(figures)
    return figures


def check(figures: dict) -> None:
    """A figure that may not be so ends the benchmark."""
    found, expected = figures["index"]["counts"], sizes(figures["set"]["rows"])
    peak = max(figures[what]["peak_rss_gib"] for what in ("index", "conversion"))
    conversion = figures["conversion"]
    for right, what in (
        ((found["pairs"], found["captions"]) == expected, f"pairs and captions are {found}; expected {expected}"),
        (peak <= LIMIT_GIB, f"peak memory is {peak} GiB; expected at most {LIMIT_GIB}"),
        (conversion["kept_of_the_killed"] > 0, "the killed conversion left nothing"),
        (conversion["nothing_twice"], "the conversion that went on encoded again what was there"),
        (conversion["same_as_in_one_go"], "the conversion that was killed ends in other parts than one in a go"),
    ):
        if not right:
            raise UserError(f"{what}: a defect of pso/pairs.py or pso/parts.py.")


def text(told: dict) -> str:
    made, found, moved = told["set"], told["index"], told["conversion"]
    dropped = ", ".join(f"{name} {count:,}" for name, count in found["counts"]["dropped"].items() if count)
    rows = [
        ("rows, shards", f"{made['rows']:,} in {made['shards']} ({made['gb']} GB, pictures of {SIDE} px)"),
        ("pairs", f"{found['counts']['pairs']:,}"),
        ("different captions", f"{found['counts']['captions']:,}"),
        ("dropped", dropped),
        ("index", f"{found['index_s']} s, {found['rows_per_s']:,} rows/s"),
        (f"plan of {found['visits']:,} visits", f"{found['plan_s']} s"),
        ("peak memory of both", f"{found['peak_rss_gib']} GiB"),
        ("conversion without a network", f"{moved['pairs']:,} pairs, {moved['pairs_per_s']:,} pairs/s"),
        ("its peak memory, torch included", f"{moved['peak_rss_gib']} GiB"),
        (
            "killed and gone on with",
            f"{moved['kept_of_the_killed']:,} kept, {moved['encoded_after_it']:,} encoded after",
        ),
    ]
    table = "\n".join(["| | |", "|:--|--:|", *(f"| {name} | {value} |" for name, value in rows)])
    return (
        "# Preference pairs at the size of Pick-a-Pic v2\n\n"
        "A synthetic set in the true schema. The index reads captions and labels of all rows and no picture; the "
        "conversion reads the pictures of the visited pairs. The one that was killed ends in the same files as one in "
        f"a go.\n\n{table}\n\n`{told['command']}`; pyarrow {told['versions']['pyarrow']}.\n"
    )


if __name__ == "__main__":
    job, *given = sys.argv[1:]
    numbers = [int(value) for value in given[1:]]
    print(json.dumps({"index": index, "conversion": conversion}[job](Path(given[0]), *numbers)))

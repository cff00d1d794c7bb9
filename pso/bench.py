"""Speed and work, written to results/benchmarks/: python -m pso.bench NAME [options], the names in BENCHMARKS.

A benchmark is a module with add_arguments(parser), run(args) -> figures, or None where there is nothing to keep, and
text(told) -> markdown; found by its dotted path as methods are: this package imports neither eval nor baselines.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from pso.paths import RESULTS
from pso.provenance import atomic, code_state, hardware, sentences, versions, write_json

BENCHMARKS = {
    "score": "eval.bench_score",
    "count": "pso.bench_count",
    "pairs": "pso.bench_pairs",
    "step": "pso.bench_step",
    "peers": "pso.bench_peers",
    "online-epoch": "pso.bench_online",
    "cpu": "pso.bench_cpu",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = parser.add_subparsers(dest="benchmark", required=True)
    modules = {name: importlib.import_module(dotted) for name, dotted in BENCHMARKS.items()}
    for name, module in modules.items():
        one = chosen.add_parser(name, description=module.__doc__.splitlines()[0])
        one.add_argument("--out", type=Path, default=RESULTS / "benchmarks", help="folder of the results")
        module.add_arguments(one)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("bench"):
        figures = modules[args.benchmark].run(args)
        if figures is not None:
            keep({"benchmark": args.benchmark, **figures}, modules[args.benchmark].text, args.out)


def keep(figures: dict, text: Callable[[dict], str], folder: Path) -> None:
    """<benchmark>.json and .md, with what they were made by."""
    told = {**figures, "versions": versions(), "hardware": hardware(), "code": code_state()}
    write_json(folder / f"{told['benchmark']}.json", told)
    with atomic(folder / f"{told['benchmark']}.md") as part:
        part.write_text(text(told))
    print(text(told))


if __name__ == "__main__":
    main()

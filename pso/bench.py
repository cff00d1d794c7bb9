"""Speed and work, written to results/benchmarks/: python -m pso.bench score|count [options].

A benchmark is a module with add_arguments(parser) and run(args), found by its dotted path as methods are: this package
imports neither eval nor baselines.
"""

import argparse
import importlib
import logging
import sys
from pathlib import Path

from pso.paths import RESULTS
from pso.provenance import sentences

BENCHMARKS = {"score": "eval.bench_score", "count": "pso.bench_count"}


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
        modules[args.benchmark].run(args)


if __name__ == "__main__":
    main()

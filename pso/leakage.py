"""Which prompts of the evaluation lists were also trained on: exactly, and after strip and lower case.

    python -m pso.leakage

Training prompts are those of the lists and the captions of the pairs that the tables' runs visit; evaluation lists are
those of the tables, and further ones in datasets.yaml whose files are there. Writes results/{scale}/leakage.{md,json}.
Torch-free.
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

from pso.checks import PAIRS
from pso.config import add_arguments, from_arguments
from pso.data import READERS, leakage, load_prompts, prompts_of
from pso.entries import Config
from pso.hub import Hub, hub_dir, is_outside
from pso.imagefolder import ImageFolder
from pso.pairs import pairs_of
from pso.paths import RESULTS, scale_dir
from pso.provenance import atomic, code_state, sentences, write_json
from pso.runs import jobs
from pso.visits import kept_pairs, latents_plan, trained

log = logging.getLogger("leakage")
FURTHER = ("pickapic_test", "pickapic_v2_test", "parti_prompts")  # looked at where their files are there


def overlap(train: list[str], test: list[str]) -> dict:
    """Texts of the test list that were trained on; `alike` after strip and lower case, the exact ones among them."""
    exact = sorted(set(train) & set(test))
    return {
        "train": len(train),
        "test": len(test),
        "exact": exact,
        "alike": leakage(prompts_of(train), prompts_of(test)),
    }


def data_sets(config: Config) -> tuple[list[str], list[str]]:
    """Names of the data sets that the tables' runs train on, and of the evaluation lists that they show."""
    texts = [name for name, entry in config.datasets.items() if entry.format in (*READERS, *PAIRS)]
    used = {method.data for _, method in trained(config)}
    shown = {job.eval_set for job in jobs(config)}
    return [name for name in texts if name in used], [name for name in texts if name in shown]


def trained_on(config: Config, hub: Hub, name: str) -> list[str]:
    """Different texts of a data set that the tables' runs train on."""
    entry = config.datasets[name]
    if entry.format in READERS:
        prompts = load_prompts(hub.files(entry.repo, entry.files), entry, name)
        return list(dict.fromkeys(prompt.text for prompt in prompts))
    if entry.format == "imagefolder":
        return ImageFolder(hub.repo(entry.repo) / entry.files, entry, name).prompts
    pairs, _ = pairs_of(hub, entry, name)
    kept = np.zeros(len(pairs), bool)
    for model in sorted({model for model, method in trained(config) if method.data == name}):
        kept |= kept_pairs(latents_plan(config, model, name), len(pairs), pairs.left_out)
    return [pairs.prompts[i] for i in np.unique(pairs.prompt_index[kept])]


def evaluated_on(config: Config, hub: Hub, shown: list[str]) -> dict[str, list[str]]:
    """Evaluation list -> texts."""
    found = {}
    for name in [*shown, *(name for name in FURTHER if name in config.datasets and name not in shown)]:
        entry = config.datasets[name]
        root = Path(entry.repo) if is_outside(entry.repo) else hub.root / entry.repo
        if name not in shown and not any(root.glob(entry.files)):
            log.info("%s is not there; it is left out.", name)
            continue
        found[name] = [p.text for p in load_prompts(hub.files(entry.repo, entry.files), entry, name)]
    return found


def report(config: Config, results: Path) -> dict:
    hub = Hub(hub_dir(config.scale, results))
    train, shown = data_sets(config)
    test = evaluated_on(config, hub, shown)
    texts = {name: trained_on(config, hub, name) for name in train}
    found = {one: {other: overlap(texts[one], test[other]) for other in test} for one in train}
    return {"scale": config.scale, "overlaps": found, "code": code_state()}


def to_markdown(told: dict) -> str:
    parts = [
        f"# Prompts trained and evaluated on, scale {told['scale']}",
        "Different texts; alike: after strip and lower case. Of pairs the captions of those that are visited.",
        "| trained on | texts | evaluated on | texts | exactly | alike |\n|:--|--:|:--|--:|--:|--:|",
    ]
    lines, texts = [], []
    for one, others in told["overlaps"].items():
        for other, found in others.items():
            exact, alike = found["exact"], found["alike"]
            lines.append(f"| {one} | {found['train']} | {other} | {found['test']} | {len(exact)} | {len(alike)} |")
            if alike:
                texts.append(f"{one} and {other}:\n\n" + "\n".join(f"- {_quoted(text)}" for text in alike))
    parts[-1] += "".join(f"\n{line}" for line in lines)
    return "\n\n".join([*parts, *texts]) + "\n"


def _quoted(text: str) -> str:
    return f"`{text}`" if "`" not in text and "\n" not in text else repr(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("leakage"):
        config = from_arguments(args)
        told = report(config, args.results)
        path = scale_dir(config.scale, args.results) / "leakage.json"
        write_json(path, told)
        with atomic(path.with_suffix(".md")) as part:
            part.write_text(to_markdown(told))
        print(to_markdown(told))


if __name__ == "__main__":
    main()

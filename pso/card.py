"""The model card beside every LoRA: README.md in the run's lora/, which the Hub shows and reads. Torch-free.

    python -m pso.card                             all cards of the tables asked for
    python -m pso.card --run RUN                   one run's, whether a table shows it or not

What was trained is told from run.json, how good it is from the tables' csv, on what terms from repositories.yaml. A
card that would not pass its own check (pso/card_metadata.py) is not written. Scores are of tables that show the run; of
one run alone a table may be lacking, and its card says so.
"""

import argparse
import ast
import functools
import importlib.util
from pathlib import Path

import jinja2
import yaml

from pso.campaign import Run, runs
from pso.card_metadata import FEW_STEPS, base_models, metadata, problems
from pso.card_scores import Block, blocks, eval_results, showing, table_file
from pso.config import add_arguments, load, published
from pso.dreambooth import load_subject
from pso.entries import Config, ModelEntry
from pso.hub import Hub, hub_dir
from pso.licences import Licence, Source, inherited, sentence, sources
from pso.paths import LORA_FILE, RESULTS, card_file, run_dir, subject_of
from pso.provenance import ROOT, UserError, atomic, sentences, sha256_of
from pso.templates import environment
from pso.tuned import Tuned, run_of, tuned
from pso.usage import call, code

TEMPLATES = Path(__file__).parent  # card.md.j2, usage.py.j2
TASKS = {  # what a task is for, behind "tuned by X"
    "preference": "for what people prefer",
    "style": "for the style of a set of pictures",
    "concept": "for one subject",
    "validation": "for what people prefer, to choose hyper-parameters by",
}
PROMPTS = {True: "a red circle on the left, black background", False: "an astronaut riding a horse on the beach"}
FEW_PROMPTS = 100


# ---- in words ----


def what(config: Config, told: Tuned) -> str:
    run, model = told.run, told.model
    subject = subject_of(run.task)
    purpose = TASKS.get(run.task.partition("/")[0], f"for the task {run.task}")
    purpose += f", `{subject}`" if subject else ""
    few = f"{told.steps}-step " if told.steps <= FEW_STEPS else ""
    return (
        f"A LoRA of rank {model.lora_rank} for the UNet of the {few}text-to-image model {model_title(config, told)}, "
        f"tuned by {method_title(config, told)} {purpose}."
    )


def title_of(config: Config, told: Tuned) -> str:
    scale = "" if config.scale == "paper" else f", scale {config.scale}"
    subject = f", {subject_of(told.run.task)}" if subject_of(told.run.task) else ""
    return f"{method_title(config, told)} w/ {model_title(config, told)}{subject} (LoRA, seed {told.run.seed}{scale})"


def method_title(config: Config, told: Tuned) -> str:
    entry = config.methods.get(told.run.method)
    return (entry or told.method).title


def model_title(config: Config, told: Tuned) -> str:
    entry = config.models.get(told.run.model)
    return (entry or told.model).title


def about(module: str) -> tuple[str, str]:
    """Where a method's code is, and the first sentence of its docstring; it is not imported."""
    spec = importlib.util.find_spec(module.partition(":")[0])
    path = Path(spec.origin) if spec is not None and spec.origin else None
    docstring = ast.get_docstring(ast.parse(path.read_text())) if path is not None and path.suffix == ".py" else None
    inside = path is not None and path.is_relative_to(ROOT)
    first = (docstring or "It has no docstring.").split("\n\n")[0]
    return str(path.relative_to(ROOT)) if inside else module, " ".join(first.split())


def composition(told: Tuned) -> list[str]:
    """What has to be loaded, in order."""
    model = told.model
    parts = [f"the pipeline `{model.base}`"]
    if model.unet is not None:
        where = model.unet.file or f"{model.unet.subfolder or 'the repository'}, a folder with its own config"
        parts.append(f"in place of its UNet that of `{model.unet.repo}` ({where})")
    parts += [f"{d.scale:g} x (the UNet of `{d.repo}` - that of `{d.minus}`)" for d in model.deltas]
    parts += [f"{lora.scale:g} x the LoRA `{lora.repo}` ({lora.file}), added to the weights" for lora in model.loras]
    parts += [f"in place of its VAE `{model.vae}`"] if model.vae else []
    return [*parts, "this LoRA, last"]


def guidance(model: ModelEntry) -> str:
    if model.guidance_embedding is not None:
        return f", told a guidance of {model.guidance_embedding:g} (it is distilled in, nothing is drawn twice)"
    return f", with classifier-free guidance {model.guidance_scale:g}" if model.guidance_scale > 1 else ", unguided"


def settings(config: Config, told: Tuned) -> list[tuple[str, str]]:
    """What the training was asked for; what it cost and all else is in run.json."""
    tune, model, record = told.method.tune, told.model, told.record
    found = {
        "objective": ", ".join(f"{key} {_plain(value)}" for key, value in told.method.objective.items()),
        "updates": f"{tune.num_updates:,}",
        "batch of an update": tune.batch_size,
        "learning rate": f"{tune.learning_rate:g}, constant (AdamW)",
        "weight decay": f"{tune.weight_decay:g}",
        "gradient clipped at norm": f"{tune.max_grad_norm:g}",
        "training seed": told.run.seed,
        "LoRA": f"rank and alpha {model.lora_rank}, on {', '.join(model.lora_targets)}",
        "frozen weights": f"{record['config']['dtype']}, LoRA and losses float32",
        "training reward": config.metrics[told.method.reward].title if told.method.reward else "none",
    }
    return [(name, str(value)) for name, value in found.items()]


def _plain(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def counts(told: Tuned) -> list[str]:
    """Of the training data, dropped rows with their reasons, as run.json counted them."""
    data = told.record["data"]
    found = [f"{key.replace('_', ' ')}: {_number(value)}" for key, value in data.items() if key != "dropped"]
    dropped = {reason: count for reason, count in data.get("dropped", {}).items() if count}
    if dropped:
        reasons = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in dropped.items())
        found.append(f"rows dropped: {sum(dropped.values()):,} ({reasons})")
    elif "dropped" in data:
        found.append("rows dropped: none")
    return found


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def toy(config: Config) -> str | None:
    """What has to stand first on the card of weights that fit nothing published."""
    made = {
        "standin": "was trained on stand-ins that this repository makes from nothing on a procedural toy world",
        "random": "was trained on networks of random numbers",
    }.get(config.scale_entry.hub)
    if made is None:
        return None
    return (
        f"It {made}: {config.scale_entry.caption.rstrip('.')}. The stand-ins carry the names of the published "
        "repositories in whose place they stand; on the published weights this file is useless."
    )


def limits(config: Config, told: Tuned, shown: list[Block]) -> list[str]:
    found = [f"Scale {config.scale}: {config.scale_entry.caption}"]
    fewest = min((block.prompts for block in shown), default=0)
    if fewest and fewest < FEW_PROMPTS:
        found.append(f"Measured on few prompts, {fewest} at the least: small differences cannot be told.")
    found += list(dict.fromkeys(block.over for block in shown))
    found += list(dict.fromkeys(line for block in shown for line in block.dropped))
    diverse = [line for block in shown if (line := block.diversity())]
    found += diverse or ["Whether it draws fewer different pictures of a prompt was not measured."]
    if config.scale_entry.dtype != "float32":
        found.append(f"Scores are of pictures drawn in {config.scale_entry.dtype}; the code above loads float16.")
    if told.method.reward is not None:
        title = config.metrics[told.method.reward].title
        found.append(f"It was trained to score high by {title}, and may exploit what that judge cannot see.")
    found.append("What the base model and the data carry of bias and unsafe content was not looked for, nor removed.")
    return found


def licence_told(licence: Licence, found: list[Source], is_toy: bool) -> str:
    strict = [source for source in found if source.non_commercial]
    told = f"`{licence.id}`: the terms of the weights that it was trained on go with it."
    if licence.name is not None:
        named = f"[{licence.name}]({licence.link})" if licence.link else licence.name
        told = f"`{licence.id}` ({named}): the terms of everything below hold together."
    if strict:
        told += f" **No commercial use**: {', '.join(dict.fromkeys(source.repo for source in strict))}."
    if is_toy:
        told += " The stand-ins of this scale are made by this repository; named are the terms of what they stand for."
    return told


# ---- the card ----


@functools.cache
def citation() -> tuple[dict, str]:
    """The paper of CITATION.cff, and its BibTeX."""
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    names = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    key = f"{paper['authors'][0]['family-names']}{paper['year']}".lower()
    fields = {
        "title": paper["title"],
        "author": names,
        "booktitle": paper["collection-title"],
        "year": paper["year"],
        "url": paper["url"],
    }
    body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    told = {"title": paper["title"], "url": paper["url"], "venue": f"ICLR {paper['year']}"}
    return told, f"@inproceedings{{{key},\n{body}}}"


def text_of(config: Config, run: Run, results: Path = RESULTS, place: str | None = None, unscored: bool = False) -> str:
    """The card; place: of the LoRA in its code, a folder or a repository of the Hub (default: the run's folder);
    unscored: tables that are not made yet are named, else refused."""
    told = tuned(config, run, results)
    lacking = [name for name in showing(config, run) if unscored and not table_file(config, results, name).is_file()]
    shown = blocks(config, run, results, sha256 := sha256_of(told.lora), without=lacking)
    found = sources(config, told.model, told.method, told.dataset["repo"])
    licence, called = inherited(found), instance_prompt(config, told, results)
    title = title_of(config, told)
    head = metadata(title, found, licence, tags(config, told), eval_results(config, shown), **called)
    is_toy = toy(config) is not None
    prompt = called.get("instance_prompt", PROMPTS[is_toy])
    text = (
        templates()
        .get_template("card.md.j2")
        .render(
            metadata=head.to_yaml(),
            title=title,
            toy=toy(config),
            what=what(config, told),
            **made_by(config, told),
            sha256=sha256,
            composition=composition(told),
            folders=list(dict.fromkeys(f"`{source.repo}`" for source in found if source.outside)),
            guidance=guidance(told.model),
            place=place or told.place,
            call=call(told.model, told.steps, prompt),
            settings=settings(config, told),
            data=told.method.data,
            dataset=told.dataset,
            counts=counts(told),
            blocks=shown,
            lacking=lacking,
            reward=told.method.reward,
            limits=limits(config, told, shown),
            licence_told=licence_told(licence, found, is_toy),
            sources=found,
            local=is_toy,
            **code(config, told.model, told.steps),
        )
    )
    if wrong := problems(text, base_models(found), licence.linked):
        raise UserError(f"the card of {told.folder} {wrong[0]}; correct the entries of its model and repositories.")
    return text


def templates() -> jinja2.Environment:
    found = environment(TEMPLATES, html=False)
    found.filters["terms"] = sentence
    return found


def made_by(config: Config, told: Tuned) -> dict:
    """By which code, from what and into what."""
    module, first = about(told.method.module)
    paper, bibtex = citation()
    made = told.record["code"]
    return {
        "method": method_title(config, told),
        "module": module,
        "about": first,
        "paper": paper,
        "bibtex": bibtex,
        "file": LORA_FILE,
        "bytes": f"{told.lora.stat().st_size:,}",
        "parameters": f"{told.record['lora_parameters']:,}",
        "run": told.run,
        "scale": config.scale,
        "commit": f"{made['commit']}{' with changes' if made['dirty'] else ''}" if made["commit"] else None,
        "diffusers": told.record["versions"].get("diffusers"),
        "model": told.model,
        "steps": told.steps,
    }


def tags(config: Config, told: Tuned) -> list[str]:
    own = ["pso-bench", told.run.method, told.run.model, f"scale-{config.scale}"]
    own += ["pso"] if told.method.module.startswith("pso.pso") else []
    own += ["few-step"] if told.steps <= FEW_STEPS else []
    own += ["stand-in"] if toy(config) else []
    return own


def instance_prompt(config: Config, told: Tuned, results: Path) -> dict[str, str]:
    """Of a subject: what its own pictures were called in training."""
    if (subject := subject_of(told.run.task)) is None:
        return {}
    name = told.method.data
    found = load_subject(Hub(hub_dir(config.scale, results)), config.datasets[name], name, subject)
    return {"instance_prompt": found.instance_prompt}


def write(config: Config, results: Path = RESULTS, run: Run | None = None) -> list[Path]:
    """All of the tables asked for, or one run's; the files."""
    found = []
    for one in runs(config) if run is None else [run]:
        path = card_file(run_dir(config.scale, one.task, one.model, one.method, one.seed, results))
        text = text_of(config, one, results, unscored=run is not None)
        with atomic(path) as part:
            part.write_text(text)
        found.append(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all results; that of RUN is known")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run's folder: its card alone")
    args = parser.parse_args()
    with sentences("card"):
        settings, results, run = args.set, args.results, None
        if args.run is not None:
            scale, run, results = run_of(args.run, list(published("scales", args.set, args.config_dir)))
            settings = {**args.set, "scale": scale}
        config = load(settings, args.config_dir)
        found = write(config, results, run)
        every = f"{len(found)} model cards, {results / config.scale}/*/*/*/*/lora/README.md"
        print(f"wrote {every if run is None else found[0]}")


if __name__ == "__main__":
    main()

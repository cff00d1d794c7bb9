"""Stand-ins for what others published: a run of ours on the teacher, under their repository and in their format.

    python -m pso.miniature.published --name dpo

Which run stands for which checkpoint is an entry of scales.yaml (`published`).
"""

import shutil

from pso.config import ConfigError
from pso.entries import Config
from pso.hub import Hub
from pso.miniature.common import job, log
from pso.models import load_policy
from pso.paths import LORA_FILE, finished_state, run_dir
from pso.policy import ADAPTER
from pso.provenance import UserError, atomic
from pso.standin_entries import Published

TASK = "published"


def publish(config: Config, hub: Hub, name: str) -> dict:
    known = config.scale_entry.standin.published
    if name not in known:
        raise ConfigError(f"--name is {name!r}; expected one of {', '.join(known)}.")
    entry = known[name]
    run = run_dir(config.scale, TASK, entry.model, entry.method, 0, hub.root.parents[1])
    lora = run / "lora" / LORA_FILE
    if not lora.is_file():
        again = f"python -m pso.tune --task {TASK} --model {entry.model} --method {entry.method}"
        raise UserError(f"{lora} is missing; `{again}` makes it.")
    if entry.file is not None:
        with atomic(hub.root / entry.repo / entry.file) as part:
            shutil.copyfile(lora, part)
    else:
        save_unet(config, hub, entry, lora)
    shutil.rmtree(finished_state(run), ignore_errors=True)
    log.info("saved %s", entry.repo)
    return {"run": str(run.relative_to(hub.root.parent))}


def save_unet(config: Config, hub: Hub, entry: Published, lora) -> None:
    """The teacher's UNet with the LoRA in its weights, as a folder of diffusers."""
    policy = load_policy(config.models[entry.model], hub, name=entry.model)
    policy.load_lora(lora.parent)
    policy.pipeline.fuse_lora(components=["unet"], adapter_names=[ADAPTER])
    policy.pipeline.unload_lora_weights()
    policy.unet.save_pretrained(hub.root / entry.repo / (entry.subfolder or ""))


if __name__ == "__main__":
    job("published", publish, per="name")

# The model card beside every LoRA of the tables asked for. Torch-free, all in one job.

from pso.campaign import runs
from pso.paths import CARD_FILES, card_file, run_dir
from pso.provenance import sha256_of


localrules:
    cards,


RUNS = [
    run_dir(SCALE, run.task, run.model, run.method, run.seed) for run in runs(CONFIG)
]
CARDS = [str(card_file(folder)) for folder in RUNS]

# what cards tell beside VIEW: how models are called, where data lies, on what terms all of it is published
NAMED = {
    "models": {"__all__": {"title"}},
    "datasets": {"__all__": {"repo"}},
    "repositories": {"__all__": {"licence", "non_commercial", "source", "variant"}},
}


rule cards:
    input:
        [f"{BASE}/tables/{name}.csv" for name in CONFIG.tables],
        [f"{folder}/run.json" for folder in RUNS],
        [f"{folder}/lora/{LORA_FILE}" for folder in RUNS],
    output:
        CARDS,
    log:
        f"{BASE}/logs/cards.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("cards"),
    params:
        view=VIEW,
        names=CONFIG.model_dump(include=NAMED),
        files=[sha256_of(path) for path in CARD_FILES],
        code=fingerprint("pso.card"),
    shell:
        "python -m pso.card 2>&1 | tee {log}"

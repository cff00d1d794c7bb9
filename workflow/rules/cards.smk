# The model card beside every LoRA of the tables asked for. Torch-free, all in one job.


localrules:
    cards,


CARDS = [
    str(card_file(run_dir(SCALE, tuned.task, tuned.model, tuned.method, tuned.seed)))
    for tuned in runs(CONFIG)
]


rule cards:
    input:
        [f"{BASE}/tables/{name}.csv" for name in CONFIG.tables],
        [path.replace("lora/README.md", "run.json") for path in CARDS],
        [path.replace("README.md", LORA_FILE) for path in CARDS],
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
        # told as they are found beside the code
        files=[sha256_of(path) for path in CARD_FILES],
        code=fingerprint("pso.card"),
    shell:
        "python -m pso.card 2>&1 | tee {log}"

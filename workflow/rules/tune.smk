# One run: one LoRA. state/ beside the outputs is undeclared on purpose: it survives a failed job.


rule tune:
    input:
        tune_inputs,
        # they belong to their texts, whichever are beside them
        ancient(kept_texts),
        # a warning at most, so that what is trained stays when scorers change
        ancient(lambda w: calibrations(CONFIG, w.task, w.model)),
    output:
        f"{BASE}/{{task}}/{{model}}/{{method}}/seed{{seed}}/lora/{LORA_FILE}",
        f"{BASE}/{{task}}/{{model}}/{{method}}/seed{{seed}}/run.json",
        f"{BASE}/{{task}}/{{model}}/{{method}}/seed{{seed}}/config.yaml",
    log:
        f"{BASE}/logs/{{task}}-{{model}}-{{method}}-seed{{seed}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("tune", "{task} {model} {method} seed{seed}"),
        gpu=1,
        nodes=1,
    params:
        settings=lambda w: run_params(CONFIG, w.model, w.method),
        code=lambda w: fingerprint(*run_modules(CONFIG, w.method)),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m pso.tune --task {wildcards.task} --model {wildcards.model}"
        " --method {wildcards.method} --seed {wildcards.seed} 2>&1 | tee {log}"

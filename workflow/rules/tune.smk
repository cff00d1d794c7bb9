# One run: one LoRA. state/ beside the outputs is undeclared on purpose: it survives a failed job.


rule tune:
    input:
        tune_inputs,
    output:
        f"{BASE}/{{task}}/{{model}}/{{method}}/seed{{seed}}/lora/{LORA_FILE}",
        f"{BASE}/{{task}}/{{model}}/{{method}}/seed{{seed}}/run.json",
        f"{BASE}/{{task}}/{{model}}/{{method}}/seed{{seed}}/config.yaml",
    log:
        f"{BASE}/logs/{{task}}-{{model}}-{{method}}-seed{{seed}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        gpu=1,
    params:
        method=lambda w: CONFIG.methods[w.method].model_dump(),
        model=lambda w: CONFIG.models[w.model].model_dump(),
        code=lambda w: fingerprint(
            CONFIG.methods[w.method].module, "pso.mdp", "pso.evidence", "pso.sources"
        ),
    shell:
        "python -m pso.tune --task {wildcards.task} --model {wildcards.model}"
        " --method {wildcards.method} --seed {wildcards.seed} 2>&1 | tee {log}"

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
        method=lambda w: method_settings(w.method),
        model=lambda w: model_settings(w.model, CONFIG.models[w.model].tuned_steps),
        rewards=lambda w: {
            m: scorer_settings(m) for m in CONFIG.methods[w.method].metrics
        },
        dtype=CONFIG.scale_entry.dtype,
        code=lambda w: fingerprint(
            "pso.tune",
            CONFIG.methods[w.method].module,
            *source_modules(w.method),
            *(CONFIG.metrics[m].module for m in CONFIG.methods[w.method].metrics),
        ),
    shell:
        "python -m pso.tune --task {wildcards.task} --model {wildcards.model}"
        " --method {wildcards.method} --seed {wildcards.seed} 2>&1 | tee {log}"

# Data as training wants it: clean latents (mean and std) and text conditions, made once.


rule latents:
    input:
        lambda w: STEPS.pairs(w.dataset),
        lambda w: STEPS.model(w.model),
    output:
        f"{BASE}/cache/{{model}}/{{dataset}}.safetensors",
        f"{BASE}/cache/{{model}}/{{dataset}}.json",
    log:
        f"{BASE}/logs/latents-{{model}}-{{dataset}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        model=lambda w: pair_settings(w.model, w.dataset),
        dataset=lambda w: CONFIG.datasets[w.dataset].model_dump(),
        code=fingerprint("pso.caches"),
    shell:
        "python -m pso.caches --model {wildcards.model} --dataset {wildcards.dataset} 2>&1 | tee {log}"


rule embeddings:  # only for methods that compare pair with pair
    input:
        lambda w: STEPS.pairs(w.dataset),
        lambda w: STEPS.scorers(w.metric),
    output:
        f"{BASE}/cache/{{metric}}/{{dataset}}.safetensors",
        f"{BASE}/cache/{{metric}}/{{dataset}}.json",
    log:
        f"{BASE}/logs/embeddings-{{metric}}-{{dataset}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        metric=lambda w: scorer_params(CONFIG, w.metric),
        dataset=lambda w: CONFIG.datasets[w.dataset].model_dump(),
        code=lambda w: fingerprint("pso.embeddings", CONFIG.metrics[w.metric].module),
    shell:
        "python -m pso.embeddings --metric {wildcards.metric} --dataset {wildcards.dataset} 2>&1 | tee {log}"

# Data as training wants it: clean latents (mean and std) and text conditions, made once.


rule latents:
    input:
        hub_inputs("data"),
        lambda w: model_inputs(w.model),
    output:
        f"{BASE}/cache/{{model}}/{{dataset}}.safetensors",
        f"{BASE}/cache/{{model}}/{{dataset}}.json",
    log:
        f"{BASE}/logs/latents-{{model}}-{{dataset}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        model=lambda w: CONFIG.models[w.model].model_dump(
            include={"base", "vae", "resolution"}
        ),
        dataset=lambda w: CONFIG.datasets[w.dataset].model_dump(),
        code=fingerprint("pso.caches"),
    shell:
        "python -m pso.caches --model {wildcards.model} --dataset {wildcards.dataset} 2>&1 | tee {log}"

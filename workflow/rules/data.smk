# Data as training wants it: clean latents (mean and std) and text conditions, made once. Which pairs of a published set
# are kept is no param: with one more seed or table all finished runs would be trained again, because their cache is
# newer than they are. A run whose pairs are not there ends at once with the command that adds them.

from pso.leakage import data_sets
from pso.visits import latents_plan, trained

TRAINED, SHOWN = data_sets(CONFIG)


localrules:
    leakage,


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
    resources:
        **needs("latents", "{model} {dataset}"),
        gpu=1,
        nodes=1,
    params:
        **CONFIG.scale_entry.model_dump(include={"dtype", "speed"}),
        model=lambda w: pair_params(CONFIG, w.model, w.dataset),
        dataset=lambda w: CONFIG.datasets[w.dataset].model_dump(),
        code=fingerprint("pso.caches"),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m pso.caches --model {wildcards.model} --dataset {wildcards.dataset} 2>&1 | tee {log}"


rule texts:  # text conditions of prompts, once for all models of a base. More tables add to it, so nothing is made anew for it
    input:
        lambda w: STEPS.data(*text_data(w)),
        lambda w: STEPS.base(base_of(w)),
    output:
        f"{BASE}/cache/texts/{{base}}.safetensors",
        f"{BASE}/cache/texts/{{base}}.json",
    log:
        f"{BASE}/logs/texts-{{base}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("texts", "{base}"),
        gpu=1,
        nodes=1,
    params:
        model=lambda w: models_of(base_of(w))[0],
        sets=lambda w: text_sets(CONFIG, base_of(w)),
        datasets=lambda w: {
            name: CONFIG.datasets[name].model_dump(exclude={"num_seeds"})
            for name in text_data(w)
        },
        dtype=CONFIG.scale_entry.dtype,
        code=fingerprint("pso.texts"),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m pso.texts --model {params.model} 2>&1 | tee {log}"


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
    resources:
        **needs("embeddings", "{metric} {dataset}"),
        gpu=1,
        nodes=1,
    params:
        metric=lambda w: scorer_params(CONFIG, w.metric),
        dataset=lambda w: CONFIG.datasets[w.dataset].model_dump(),
        code=lambda w: fingerprint("pso.embeddings", CONFIG.metrics[w.metric].module),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m pso.embeddings --metric {wildcards.metric} --dataset {wildcards.dataset} 2>&1 | tee {log}"


rule leakage:  # which evaluation prompts were trained on
    input:
        [path for name in TRAINED for path in STEPS.pairs(name)],
        STEPS.data(*SHOWN),
    output:
        f"{BASE}/leakage.md",
        f"{BASE}/leakage.json",
    log:
        f"{BASE}/logs/leakage.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("leakage"),
    params:
        datasets={
            name: CONFIG.datasets[name].model_dump()
            for name in sorted({*TRAINED, *SHOWN})
        },
        plans=[
            latents_plan(CONFIG, model, method.data)
            for model, method in trained(CONFIG)
        ],
        code=fingerprint("pso.leakage"),
    shell:
        "python -m pso.leakage 2>&1 | tee {log}"

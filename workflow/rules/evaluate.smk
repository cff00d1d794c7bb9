# One process per base model makes and scores the images of all its rows: loading costs more than a row.
# The image shards are undeclared, so that they survive a failed job; images.json lists them with sha256.


rule generate:
    input:
        hub_inputs("data"),
        lambda w: model_inputs(w.model),
        lora_inputs,
    output:
        f"{BASE}/{{task}}/{{model}}/images.json",
    log:
        f"{BASE}/logs/generate-{{task}}-{{model}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        gpu=1,
    params:
        rows=lambda w: [str(job.images(SCALE)) for job in image_jobs(w)],
        model=lambda w: CONFIG.models[w.model].model_dump(),
        eval=[
            CONFIG.scale_entry.eval_seed,
            CONFIG.scale_entry.eval_batch,
            CONFIG.scale_entry.dtype,
        ],
        code=fingerprint(
            "pso.mdp", "pso.policy", "pso.rollout", "pso.models", "eval.generate"
        ),
    shell:
        "python -m eval.generate --model {wildcards.model} 2>&1 | tee {log}"


rule score:
    input:
        f"{BASE}/{{task}}/{{model}}/images.json",
        hub_inputs("clip", "judges"),
    output:
        f"{BASE}/{{task}}/{{model}}/scores.json",
    log:
        f"{BASE}/logs/score-{{task}}-{{model}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        gpu=1,
    params:
        metrics={name: CONFIG.metrics[name].model_dump() for name in metrics(CONFIG)},
        code=fingerprint(
            "eval.score",
            "eval.transforms",
            "eval.clip_model",
            *(CONFIG.metrics[m].module for m in metrics(CONFIG)),
        ),
    shell:
        "python -m eval.score --model {wildcards.model} 2>&1 | tee {log}"

# One process per base model and task makes and scores the images of all rows and subjects: loading costs more.
# The image shards are undeclared, so that they survive a failed job; images.json lists them with sha256.


rule generate:
    input:
        lambda w: STEPS.data(*image_sets(w)),
        lambda w: STEPS.model(w.model) + STEPS.gate(w.model),
        lora_inputs,
        ancient(kept_texts),
        made_before("images"),
    output:
        f"{BASE}/{{task}}/{{model}}/images.json",
    log:
        f"{BASE}/logs/generate-{{task}}-{{model}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("generate", "{task} {model}"),
        gpu=1,
        nodes=1,
    params:
        rows=lambda w: [str(job.images(SCALE)) for job in image_jobs(w)],
        model=lambda w: model_params(CONFIG, w.model),
        eval_sets=lambda w: {
            name: CONFIG.datasets[name].model_dump() for name in image_sets(w)
        },
        eval=CONFIG.scale_entry.model_dump(
            include={"eval_seed", "eval_batch", "dtype", "speed"}
        ),
        code=fingerprint("eval.generate"),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m eval.generate --model {wildcards.model} --task {wildcards.task} 2>&1 | tee {log}"


rule score:
    input:
        f"{BASE}/{{task}}/{{model}}/images.json",
        lambda w: STEPS.scorers(*metrics(CONFIG, w.task)),
        subject_pictures,
        made_before("scores"),
    output:
        f"{BASE}/{{task}}/{{model}}/scores.json",
    log:
        f"{BASE}/logs/score-{{task}}-{{model}}.log",
    conda:
        "../../envs/score.yaml"
    resources:
        **needs("score", "{task} {model}"),
        gpu=1,
        nodes=1,
    params:
        metrics=lambda w: {
            name: scorer_params(CONFIG, name) for name in metrics(CONFIG, w.task)
        },
        code=lambda w: fingerprint(
            "eval.score", *(CONFIG.metrics[m].loader for m in metrics(CONFIG, w.task))
        ),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m eval.score --model {wildcards.model} --task {wildcards.task} 2>&1 | tee {log}"

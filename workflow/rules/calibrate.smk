# Before a GPU-day is spent: the untuned rows, made and scored as all others are, against the paper's cells.
# Their shards and scores are those of the full jobs, which keep them. At scales whose weights are fetched every tuning
# job waits for its model's calibrate.json. At the others nothing does, and `snakemake calibrate` is for trying it out.


localrules:
    calibrate,
    calibrate_model,


rule calibrate:
    input:
        lambda w: sorted(
            {untuned("scores", task, row.model) for task, row in calibrated(CONFIG)}
        ),
        reference(*CONFIG.tables),
    output:
        multiext(f"{BASE}/calibrate", ".md", ".json"),
    log:
        f"{BASE}/logs/calibrate.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("calibrate"),
    params:
        view=VIEW,
        code=fingerprint("eval.calibrate"),
    shell:
        "python -m eval.calibrate 2>&1 | tee {log}"


rule calibrate_model:
    input:
        lambda w: untuned("scores", w.task, w.model),
        reference(*CONFIG.tables),
    output:
        f"{BASE}/{{task}}/{{model}}/calibrate.json",
    log:
        f"{BASE}/logs/calibrate-{{task}}-{{model}}.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("calibrate_model"),
    params:
        view=VIEW,
        code=fingerprint("eval.calibrate"),
    shell:
        "python -m eval.calibrate --model {wildcards.model} --task {wildcards.task} 2>&1 | tee {log}"


rule generate_untuned:
    input:
        lambda w: STEPS.data(*image_sets(w, untuned=True)),
        lambda w: STEPS.model(w.model) + STEPS.gate(w.model),
        ancient(kept_texts),
    output:
        f"{BASE}/{{task}}/{{model}}/untuned_images.json",
    log:
        f"{BASE}/logs/generate_untuned-{{task}}-{{model}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("generate_untuned", "{task} {model}"),
        gpu=1,
        nodes=1,
    params:
        rows=lambda w: [str(job.images(SCALE)) for job in image_jobs(w, untuned=True)],
        model=lambda w: model_params(CONFIG, w.model),
        eval_sets=lambda w: {
            name: CONFIG.datasets[name].model_dump()
            for name in image_sets(w, untuned=True)
        },
        eval=CONFIG.scale_entry.model_dump(
            include={"eval_seed", "eval_batch", "dtype", "speed"}
        ),
        code=fingerprint("eval.generate"),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m eval.generate --model {wildcards.model} --task {wildcards.task} --untuned 2>&1 | tee {log}"


rule score_untuned:
    input:
        f"{BASE}/{{task}}/{{model}}/untuned_images.json",
        lambda w: STEPS.scorers(*metrics(CONFIG, w.task)),
        subject_pictures,
    output:
        f"{BASE}/{{task}}/{{model}}/untuned_scores.json",
    log:
        f"{BASE}/logs/score_untuned-{{task}}-{{model}}.log",
    conda:
        "../../envs/score.yaml"
    resources:
        **needs("score_untuned", "{task} {model}"),
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
        " -m eval.score --model {wildcards.model} --task {wildcards.task} --untuned 2>&1 | tee {log}"

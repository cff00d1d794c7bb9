# SPO's step-aware preference model for one distilled model: trained on that model's own predictions.


rule preference_model:
    input:
        STEPS.scorers("spm_lite"),
        lambda w: STEPS.model(w.model),
        lambda w: f"{BASE}/cache/{w.model}/{SPM.data}.safetensors",
    output:
        f"{HUB}/preference_model_{{model}}.json",
        f"{HUB}/SPO-Diffusion-Models/Step-Aware_Preference_Models/{{model}}_step-aware_preference_model.safetensors",
    log:
        f"{BASE}/logs/preference_model-{{model}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("preference_model", "{model}"),
        gpu=1,
        nodes=1,
    params:
        **CONFIG.scale_entry.model_dump(include={"dtype", "speed"}),
        settings=SPM.model_dump() if SPM else None,
        seed=CONFIG.scale_entry.seed,
        model=lambda w: model_params(
            CONFIG, w.model, CONFIG.models[w.model].tuned_steps
        ),
        scorer=scorer_params(CONFIG, "spm_lite"),
        code=fingerprint("baselines.preference_training"),
    shell:
        "python -m pso.launch --gpus {resources.gpu} --nodes {resources.nodes} --cpus {threads}"
        " -m baselines.preference_training --model {wildcards.model} 2>&1 | tee {log}"

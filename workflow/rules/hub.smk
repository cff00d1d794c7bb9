# The stand-in hub of the small scales: repositories under their real ids, trained from nothing on the procedural world.


rule hub:
    input:
        STEPS.all(),
        STEPS.shown(),


rule hub_vae:
    output:
        f"{HUB}/vae.json",
        f"{HUB}/madebyollin/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors",
    log:
        f"{BASE}/logs/hub_vae.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_vae"),
    params:
        settings=hub_settings("vae", "num_images"),
        code=fingerprint("pso.miniature.vae"),
    shell:
        "python -m pso.miniature.vae 2>&1 | tee {log}"


rule hub_clip:
    output:
        f"{HUB}/clip.json",
        f"{HUB}/openai/clip-vit-large-patch14/model.safetensors",
        f"{HUB}/laion/CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors",
    log:
        f"{BASE}/logs/hub_clip.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_clip"),
    params:
        settings=hub_settings("clip", "num_images"),
        code=fingerprint("pso.miniature.clip"),
    shell:
        "python -m pso.miniature.clip 2>&1 | tee {log}"


rule hub_data:
    output:
        f"{HUB}/data.json",
    log:
        f"{BASE}/logs/hub_data.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_data"),
    params:
        settings=hub_settings("num_pairs", "num_prompts"),
        code=fingerprint("pso.miniature.data"),
    shell:
        "python -m pso.miniature.data 2>&1 | tee {log}"


rule hub_style:
    output:
        f"{HUB}/style.json",
    log:
        f"{BASE}/logs/hub_style.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_style"),
    params:
        settings=hub_settings("num_style_pictures"),
        code=fingerprint("pso.miniature.style"),
    shell:
        "python -m pso.miniature.style 2>&1 | tee {log}"


rule hub_judges:
    input:
        STEPS.named("clip"),
    output:
        f"{HUB}/judges.json",
        f"{HUB}/yuvalkirstain/PickScore_v1/model.safetensors",
        f"{HUB}/christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
    log:
        f"{BASE}/logs/hub_judges.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_judges"),
    params:
        settings=hub_settings("pick_score", "aesthetic", "num_pairs", "num_images"),
        code=fingerprint("pso.miniature.judges"),
    shell:
        "python -m pso.miniature.judges 2>&1 | tee {log}"


rule hub_rewards:
    input:
        STEPS.named("clip"),
    output:
        f"{HUB}/rewards.json",
        f"{HUB}/THUDM/ImageReward/ImageReward.pt",
        f"{HUB}/xswu/HPSv2/HPS_v2_compressed.pt",
        f"{HUB}/xswu/HPSv2/HPS_v2.1_compressed.pt",
    log:
        f"{BASE}/logs/hub_rewards.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_rewards"),
    params:
        settings=hub_settings("image_reward", "hps", "num_pairs", "num_images"),
        code=fingerprint("pso.miniature.rewards"),
    shell:
        "python -m pso.miniature.rewards 2>&1 | tee {log}"


rule hub_teacher:
    input:
        STEPS.named("vae", "clip"),
    output:
        f"{HUB}/teacher.json",
        f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/unet/diffusion_pytorch_model.safetensors",
    log:
        f"{BASE}/logs/hub_teacher.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_teacher"),
    params:
        settings=hub_settings("teacher", "num_images"),
        code=fingerprint("pso.miniature.teacher"),
    shell:
        "python -m pso.miniature.teacher 2>&1 | tee {log}"


rule hub_dmd2:
    input:
        STEPS.named("teacher"),
    output:
        f"{HUB}/dmd2.json",
        f"{HUB}/tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin",
    log:
        f"{BASE}/logs/hub_dmd2.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_dmd2"),
    params:
        settings=hub_settings("dmd2", "num_images"),
        code=fingerprint("pso.miniature.dmd2"),
    shell:
        "python -m pso.miniature.dmd2 2>&1 | tee {log}"


rule hub_lcm:
    input:
        STEPS.named("teacher"),
    output:
        f"{HUB}/lcm.json",
        f"{HUB}/latent-consistency/lcm-sdxl/diffusion_pytorch_model.safetensors",
    log:
        f"{BASE}/logs/hub_lcm.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_lcm"),
    params:
        settings=hub_settings("lcm"),
        code=fingerprint("pso.miniature.lcm"),
    shell:
        "python -m pso.miniature.lcm 2>&1 | tee {log}"


rule hub_turbo:
    input:
        STEPS.named("teacher"),
    output:
        f"{HUB}/turbo.json",
        f"{HUB}/stabilityai/sdxl-turbo/unet/diffusion_pytorch_model.safetensors",
    log:
        f"{BASE}/logs/hub_turbo.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_turbo"),
    params:
        settings=hub_settings("turbo"),
        code=fingerprint("pso.miniature.turbo"),
    shell:
        "python -m pso.miniature.turbo 2>&1 | tee {log}"


rule hub_loras:
    input:
        STEPS.named("teacher", "dmd2", "lcm"),
    output:
        f"{HUB}/loras.json",
        f"{HUB}/tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors",
        f"{HUB}/latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors",
    log:
        f"{BASE}/logs/hub_loras.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_loras"),
    params:
        settings=hub_settings("loras"),
        models={
            name: model_params(CONFIG, name, 4) for name in ("sdxl_dmd2", "sdxl_lcm")
        },
        code=fingerprint("pso.miniature.loras"),
    shell:
        "python -m pso.miniature.loras 2>&1 | tee {log}"


rule hub_subjects:
    output:
        f"{HUB}/subjects.json",
        f"{HUB}/google/dreambooth/dataset/prompts_and_classes.txt",
    log:
        f"{BASE}/logs/hub_subjects.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_subjects"),
    params:
        settings=hub_settings(),
        code=fingerprint("pso.miniature.subjects"),
    shell:
        "python -m pso.miniature.subjects 2>&1 | tee {log}"


rule hub_likeness:
    output:
        f"{HUB}/likeness.json",
        f"{HUB}/openai/clip-vit-base-patch32/model.safetensors",
        f"{HUB}/facebook/dino-vits16/model.safetensors",
    log:
        f"{BASE}/logs/hub_likeness.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_likeness"),
    params:
        settings=hub_settings("likeness", "num_images"),
        code=fingerprint("pso.miniature.likeness"),
    shell:
        "python -m pso.miniature.likeness 2>&1 | tee {log}"


for name, run in STEPS.published.items():

    rule:  # a checkpoint that others published: here a run of ours on the teacher
        name:
            f"hub_published_{name}"
        input:
            STEPS.named("teacher"),
            f"{BASE}/published/{run.model}/{run.method}/seed0/lora/{LORA_FILE}",
        output:
            f"{HUB}/published_{name}.json",
        log:
            f"{BASE}/logs/hub_published_{name}.log",
        conda:
            "../../envs/pso-bench.yaml"
        resources:
            **needs("hub_published"),
        params:
            published=run.model_dump(),
            code=fingerprint("pso.miniature.published"),
            name=name,
        shell:
            "python -m pso.miniature.published --name {params.name} 2>&1 | tee {log}"


rule hub_gate:  # before a student is tuned or shown; a change that makes it run again makes those run again too
    input:
        lambda w: STEPS.model(w.model),
        lambda w: STEPS.named(f"gate_{GATE.teacher}") if w.model != GATE.teacher else [],
    output:
        f"{HUB}/gate_{{model}}.json",
    log:
        f"{BASE}/logs/hub_gate-{{model}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("hub_gate"),
    params:
        settings=hub_settings("gate"),
        model=lambda w: model_params(
            CONFIG,
            w.model,
            GATE.teacher_steps if w.model == GATE.teacher else GATE.steps,
        ),
        code=fingerprint("pso.miniature.gate"),
    shell:
        "python -m pso.miniature.gate --model {wildcards.model} 2>&1 | tee {log}"

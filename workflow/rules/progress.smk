# How far every run is, its images and its scores. It makes no file that another job makes or reads, so it is told
# also while a workflow runs in this folder: Snakemake's lock is by files.


localrules:
    progress,


rule progress:
    log:
        f"{BASE}/logs/progress.log",
    conda:
        "../../envs/driver.yaml"
    shell:
        "python -m pso.progress 2>&1 | tee {log}"

# What the tables asked for will cost, before anything is run. Without an output, so that it is told whenever asked for.


localrules:
    cost,


rule cost:  # writes {BASE}/estimate.md and .json
    log:
        f"{BASE}/logs/estimate.log",
    conda:
        "../../envs/pso-bench.yaml"
    shell:
        "python -m pso.estimate --write 2>&1 | tee {log}"

# Whether the scale can start here; it makes nothing, and its exit code is the verdict.


rule doctor:
    conda:
        "../../envs/pso-bench.yaml"
    shell:
        "python -m pso.doctor"

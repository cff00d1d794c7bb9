# Whether the scale can start here; it makes nothing, and its exit code is the verdict.


localrules:
    doctor,


rule doctor:
    log:
        f"{BASE}/logs/doctor.log",
    conda:
        "../../envs/pso-bench.yaml"
    shell:
        "python -m pso.doctor 2>&1 | tee {log}"

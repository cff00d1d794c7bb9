# Ours against the official scorer packages, which have an environment of their own: `make verify_scorers` makes it.
# Another one is named by PSO_ORACLE, its python.


rule verify_scorers:
    output:
        multiext("results/verify_scorers", ".json", ".md"),
    log:
        "results/logs/verify_scorers.log",
    conda:
        "../../envs/pso-bench.yaml"
    resources:
        **needs("verify_scorers"),
    params:
        oracle=lambda w: os.environ.get("PSO_ORACLE", ".venv-oracle/bin/python"),
        code=fingerprint("eval.verify_scorers", "eval.official"),
    shell:
        "python -m eval.verify_scorers --oracle {params.oracle} 2>&1 | tee {log}"

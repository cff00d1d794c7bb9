# What a reader sees. Torch-free, seconds each.


rule table:
    input:
        lambda w: table_scores(w.table),
    output:
        multiext(f"{BASE}/tables/{{table}}", ".csv", ".tex", ".md"),
    log:
        f"{BASE}/logs/{{table}}.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        entry=lambda w: CONFIG.table_entries[w.table].model_dump(),
        code=fingerprint("eval.tables", "eval.stats", "eval.scores"),
    shell:
        "python -m eval.tables --table {wildcards.table} 2>&1 | tee {log}"


rule diff:
    input:
        lambda w: table_scores(w.table),
        str(ROOT / "eval" / "reference" / "{table}.csv"),
    output:
        multiext(f"{BASE}/tables/{{table}}.diff", ".md", ".json"),
    log:
        f"{BASE}/logs/{{table}}.diff.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        entry=lambda w: CONFIG.table_entries[w.table].model_dump(),
        code=fingerprint("eval.compare", "eval.stats", "eval.scores"),
    shell:
        "python -m eval.compare --table {wildcards.table} 2>&1 | tee {log}"


rule claims:
    input:
        all_scores(),
    output:
        multiext(f"{BASE}/claims", ".md", ".json"),
    log:
        f"{BASE}/logs/claims.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        claims={name: claim.model_dump() for name, claim in CONFIG.claims.items()},
        code=fingerprint("eval.claims", "eval.stats", "eval.scores"),
    shell:
        "python -m eval.claims 2>&1 | tee {log}"


rule figures:
    input:
        all_scores(),
    output:
        [
            f"{BASE}/figures/samples_{name}.png"
            for name in CONFIG.table_entries["table1"].eval_sets
        ],
        f"{BASE}/figures/curves.png",
    log:
        f"{BASE}/logs/figures.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        code=fingerprint("eval.figures"),
    shell:
        "python -m eval.figures 2>&1 | tee {log}"


rule cost:
    input:
        all_scores(),
        hub_inputs("vae", "clip", "data", "judges", "teacher", "dmd2"),
    output:
        f"{BASE}/cost.md",
    log:
        f"{BASE}/logs/cost.log",
    conda:
        "../../envs/pso-bench.yaml"
    params:
        code=fingerprint("eval.cost"),
    shell:
        "python -m eval.cost 2>&1 | tee {log}"

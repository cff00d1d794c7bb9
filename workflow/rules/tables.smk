# What a reader sees. Torch-free, seconds each.


localrules:
    table,
    diff,
    judge,
    draw,
    sum_up,


rule table:
    input:
        lambda w: table_scores(w.table),
        lambda w: reference(w.table),
    output:
        shown(f"{BASE}/tables/{{table}}.csv", "table", "Tables", "{table}"),
        shown(f"{BASE}/tables/{{table}}.md", "table", "Tables", "{table}"),
        f"{BASE}/tables/{{table}}.tex",
    log:
        f"{BASE}/logs/{{table}}.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("table"),
    params:
        view=VIEW,
        code=fingerprint("eval.tables"),
    shell:
        "python -m eval.tables --table {wildcards.table} 2>&1 | tee {log}"


rule diff:
    input:
        lambda w: table_scores(w.table),
        lambda w: reference(w.table),
    output:
        shown(f"{BASE}/tables/{{table}}.diff.md", "diff", "Tables", "{table}"),
        f"{BASE}/tables/{{table}}.diff.json",
    log:
        f"{BASE}/logs/{{table}}.diff.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("diff"),
    params:
        view=VIEW,
        code=fingerprint("eval.compare"),
    shell:
        "python -m eval.compare --table {wildcards.table} 2>&1 | tee {log}"


rule judge:
    input:
        all_scores(),
        reference(*CONFIG.table_entries),
    output:
        shown(f"{BASE}/claims.md", "claims", "Claims"),
        f"{BASE}/claims.json",
    log:
        f"{BASE}/logs/claims.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("judge"),
    params:
        view=VIEW,
        claims={name: claim.model_dump() for name, claim in CONFIG.claims.items()},
        code=fingerprint("eval.claims"),
    shell:
        "python -m eval.claims 2>&1 | tee {log}"


rule draw:
    input:
        all_scores(),
    output:
        [
            shown(path, "figure", "Figures") if path.endswith(".png") else path
            for path in FIGURES
        ],
    log:
        f"{BASE}/logs/figures.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("draw"),
    params:
        view=VIEW,
        code=fingerprint("eval.figures"),
    shell:
        "python -m eval.figures 2>&1 | tee {log}"


rule sum_up:
    input:
        all_scores(),
    output:
        f"{BASE}/cost.md",
    log:
        f"{BASE}/logs/cost.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("sum_up"),
    params:
        view=VIEW,
        code=fingerprint("eval.cost"),
    shell:
        "python -m eval.cost 2>&1 | tee {log}"

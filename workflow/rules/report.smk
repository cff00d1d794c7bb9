# One page of everything. Torch-free, seconds.

from pso.provenance import sha256_of

ASSETS = sorted(
    path
    for kind in ("html", "css", "js")
    for path in (ROOT / "eval" / "sections").glob(f"*.{kind}")
)


localrules:
    report_page,


rule report_page:
    input:
        all_scores(),
        [path for table in CONFIG.tables for path in table_files(table)],
        f"{BASE}/claims.json",
        f"{BASE}/cost.md",
    output:
        shown(f"{BASE}/report.html", "page", "Report"),
    log:
        f"{BASE}/logs/report.log",
    conda:
        "../../envs/driver.yaml"
    resources:
        **needs("report_page"),
    params:
        view=VIEW,
        models={name: model.title for name, model in CONFIG.models.items()},
        claims={name: claim.model_dump() for name, claim in CONFIG.claims.items()},
        assets={path.name: sha256_of(path) for path in ASSETS},
        code=fingerprint("eval.report"),
    shell:
        "python -m eval.report 2>&1 | tee {log}"

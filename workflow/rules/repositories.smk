# The hub of the scales that take the published files: one step for each repository that the tables asked for need.

from pso.steps import needed, published_entry, slug


rule hub:
    input:
        STEPS.all(),


try:
    ENTRIES = {
        slug(name): (name, published_entry(CONFIG, name))
        for name in [*CONFIG.repositories, *needed(CONFIG)]
    }
except UserError as error:
    sys.exit(f"config: {error}")


if CONFIG.scale_entry.hub == "fetched":

    localrules:
        fetch,

    rule fetch:  # a cached file is only linked; a broken download goes on where it stopped
        output:
            f"{HUB}/repositories/{{slug}}.json",
        log:
            f"{BASE}/logs/fetch-{{slug}}.log",
        conda:
            "../../envs/driver.yaml"
        resources:
            **needs("fetch", lambda w: ENTRIES[w.slug][0]),
        params:
            repo=lambda w: ENTRIES[w.slug][0],
            entry=lambda w: ENTRIES[w.slug][1].model_dump(
                include={"source", "files", "variant", "revision", "sha256"}
            ),
        shell:
            "python -m pso.fetch --repo {params.repo} 2>&1 | tee {log}"

else:

    rule draw_weights:  # the published files at the published sizes, with random numbers in them
        output:
            f"{HUB}/repositories/{{slug}}.json",
        log:
            f"{BASE}/logs/draw_weights-{{slug}}.log",
        conda:
            "../../envs/pso-bench.yaml"
        resources:
            **needs("draw_weights", lambda w: ENTRIES[w.slug][0]),
        params:
            repo=lambda w: ENTRIES[w.slug][0],
            settings=CONFIG.scale_entry.random.model_dump(),
            subjects=sorted(
                {s for t in CONFIG.table_entries.values() for s in t.subjects}
            ),
            code=fingerprint("pso.rehearsal"),
        shell:
            "python -m pso.rehearsal --repo {params.repo} 2>&1 | tee {log}"

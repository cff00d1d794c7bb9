"""The benchmark of pairs, small: its set has the counts it promises, and it ends where a figure is wrong."""

import argparse
import copy
import json

import pyarrow.parquet as pq
import pytest
from test_data import refused

from pso import bench, bench_pairs
from pso.data import PAIR_SCHEMA


def test_the_published_counts_hold_from_their_size_on():
    assert bench_pairs.sizes(959_040) == bench_pairs.sizes(1_000_000) == (851_293, 58_960)
    pairs, prompts = bench_pairs.sizes(9590)
    assert (pairs, prompts) == (8512, 589)


def test_the_set_is_in_the_true_schema_and_a_killed_conversion_goes_on(tmp_path):
    bench_pairs.write_set(tmp_path / "set", 300, 2)
    schema = pq.read_schema(tmp_path / "set/data/train-00000-of-00002.parquet")
    assert schema.equals(PAIR_SCHEMA)
    bench.main(
        ["pairs", "--rows", "3000", "--shards", "4", "--converted", "1200", "--folder", str(tmp_path), "--out",
         str(tmp_path / "out")]
    )  # fmt: skip
    told = json.loads((tmp_path / "out/pairs.json").read_text())
    counts = told["index"]["counts"]
    assert (counts["rows"], counts["pairs"], counts["captions"]) == (3000, *bench_pairs.sizes(3000))
    assert counts["dropped"]["tie"] == 3000 - counts["pairs"]
    moved = told["conversion"]
    assert moved["nothing_twice"] and moved["same_as_in_one_go"] and moved["pairs"] == 1200
    assert moved["kept_of_the_killed"] + moved["encoded_after_it"] == 1200 > moved["encoded_after_it"]
    assert 0 < told["index"]["peak_rss_gib"] < bench_pairs.LIMIT_GIB and told["index"]["rows_per_s"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]
    assert str(tmp_path) not in (tmp_path / "out/pairs.json").read_text()
    for path, value, said in (
        (("index", "peak_rss_gib"), 2.5, "peak memory is 2.5 GiB; expected at most 2.0"),
        (("index", "counts", "pairs"), 5, "pairs and captions are"),
        (("conversion", "nothing_twice"), False, "encoded again what was there"),
    ):
        wrong = copy.deepcopy(told)
        where = wrong
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value
        with refused(said):
            bench_pairs.check(wrong)
    bench_pairs.check(told)


def test_its_options_are_a_commands(capsys):
    parser = argparse.ArgumentParser()
    bench_pairs.add_arguments(parser)
    assert parser.parse_args(["--rows", "7"]).rows == 7 and parser.parse_args([]).rows == 959_040
    with pytest.raises(SystemExit):
        parser.parse_args(["--rows", "x"])

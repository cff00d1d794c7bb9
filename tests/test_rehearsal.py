"""The rehearsal's hub: every published file by its keys, shapes and types at the published sizes on the meta device,
and all of it written, loaded, tuned on, generated and scored with small networks.

What the published files hold is written down a second time where that is possible: the scorers' in eval/seeded.py by
their authors' names, the sizes of LoRAs and networks as the repositories state them.
"""

import functools
import importlib
import json
import math
import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import toy
from safetensors.torch import load_file
from toy import quiet  # noqa: F401
from transformers import BertTokenizer, CLIPTokenizer

from eval import cost, seeded
from eval.open_clip_weights import to_open_clip
from pso import architectures, rehearsal, rehearsal_small
from pso.config import load
from pso.dreambooth import load_subject
from pso.entries import UNTUNED
from pso.hub import Hub, hub_dir
from pso.models import load_metric, load_policy
from pso.pairs import iter_pairs
from pso.provenance import UserError
from pso.rehearsal import drawn, write_repository
from pso.rehearsal_data import DATA
from pso.rehearsal_weights import FP16, LORA_TARGETS, UNET_FP16, WEIGHTS, lora_layers
from pso.runs import jobs, metrics
from pso.steps import needed, slug

PUBLISHED = load({"scale": "rehearsal"})
SMALL = {
    "scale": "rehearsal",
    "scales": {
        "rehearsal": {
            "random": {"sizes": "small"},
            "dtype": "float32",
            "models": {name: {"resolution": 32} for name in PUBLISHED.models},
        }
    },
}
CONFIG = load(SMALL)
DMD2, DPO = "tianweiy/DMD2", "mhdang/dpo-sdxl-text2image-v1"
FLOAT32 = {  # files whose weights have 32 bits
    *(
        "madebyollin/sdxl-vae-fp16-fix",
        "madebyollin/taesdxl",
        DPO,
        "mapo-t2i/mapo-beta",
        "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA",
    ),
    *("SPO-Diffusion-Models/Step-Aware_Preference_Models", *seeded.SMALL, seeded.PICK_SCORE, seeded.IMAGE_REWARD),
    *(seeded.DINO, seeded.AESTHETIC, "ZichenMiao/PSO"),
}


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@functools.cache
def published(repo: str) -> dict:
    return WEIGHTS[repo](architectures, PUBLISHED)


def one(repo: str) -> dict[str, tuple[int, ...]]:
    """Of a repository with one file of weights."""
    (state,) = published(repo).values()
    return shapes(state)


# ---- published sizes, on the meta device ----


def test_every_repository_of_every_scale_that_takes_published_files_has_a_random_twin():
    assert set(needed(load({"scale": "paper"}))) <= {*WEIGHTS, *DATA}
    assert {*WEIGHTS, *DATA} == set(PUBLISHED.repositories)


@pytest.mark.parametrize("repo", WEIGHTS)
def test_no_weight_of_published_size_is_allocated_and_its_type_is_the_files(repo):
    for state in published(repo).values():
        assert all(value.is_meta for value in state.values() if value.numel() > 512)
        kinds = {value.dtype for value in state.values() if value.is_floating_point()}
        assert kinds == {torch.float32 if repo in FLOAT32 else torch.float16}


@pytest.mark.parametrize("repo", [repo for repo in WEIGHTS if repo != seeded.BERT])
def test_the_files_are_as_large_as_the_entry_says(repo):
    found = sum(v.numel() * v.element_size() for state in published(repo).values() for v in state.values()) / 1e9
    assert found == pytest.approx(PUBLISHED.repositories[repo].size_gb, rel=0.03, abs=0.005)


@pytest.mark.parametrize("repo", WEIGHTS)
def test_the_entry_fetches_every_file_that_is_drawn(repo):
    globs = PUBLISHED.repositories[repo].files
    patterns = [re.compile(re.escape(glob).replace(r"\*", "[^/]*")) for glob in globs]
    for file in published(repo):
        assert any(pattern.fullmatch(file) for pattern in patterns), file


@pytest.mark.parametrize(
    ("repo", "file", "guidance"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", f"unet/{UNET_FP16}", False),
        ("stabilityai/sdxl-turbo", f"unet/{UNET_FP16}", False),
        (DMD2, "dmd2_sdxl_4step_unet_fp16.bin", False),
        ("latent-consistency/lcm-sdxl", UNET_FP16, True),
        (DPO, "unet/diffusion_pytorch_model.safetensors", False),
        ("mapo-t2i/mapo-beta", "diffusion_pytorch_model.safetensors", False),
    ],
)
def test_each_unet_has_sdxls_2567463684_parameters_and_lcms_its_guidance_embedding(repo, file, guidance):
    state = published(repo)[file]
    assert sum(v.numel() for v in state.values()) == 2_567_463_684 + (320 * 256 if guidance else 0)
    assert shapes(state) == shapes(architectures.unet(guidance).state_dict())


def test_text_encoders_have_their_published_names_and_numbers_of_parameters():
    files = published("stabilityai/sdxl-turbo")
    for name, count in (("text_encoder", 123_060_480), ("text_encoder_2", 694_659_840)):
        state = files[f"{name}/model{FP16}.safetensors"]
        assert sum(v.numel() for v in state.values()) == count
        assert all(key.startswith(("text_model.", "text_projection.")) for key in state)


@pytest.mark.parametrize("repo", [DMD2, "latent-consistency/lcm-lora-sdxl"])
def test_the_acceleration_loras_have_197_million_parameters_and_alpha_8(repo):
    state = list(published(repo).values())[-1]
    alphas = [value.item() for key, value in state.items() if key.endswith(".alpha")]
    assert set(alphas) == {8.0} and 3 * len(alphas) == len(state)
    assert sum(v.numel() for k, v in state.items() if not k.endswith(".alpha")) == pytest.approx(197e6, rel=0.005)
    assert state["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (64, 1280, 3, 3)
    assert state["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"].shape == (1280, 64, 1, 1)


def test_a_lora_changes_no_layer_beside_its_targets():
    layers = [name for name, *_ in lora_layers(architectures.unet(), LORA_TARGETS, 4)]
    assert not [name for name in layers if name.startswith(("time_embedding", "add_embedding", "conv_"))]
    assert len(layers) == len(set(layers)) == 794 - 6  # all linear layers and convolutions but six at the ends


def test_spos_lora_has_the_560_attention_layers_at_rank_64():
    state = one("SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA")
    assert len(state) == 2 * 560 and sum(map(math.prod, state.values())) == 92_897_280
    assert all(64 in shape for shape in state.values())


@pytest.mark.parametrize("repo", [seeded.CLIP_H, seeded.CLIP_L, seeded.CLIP_B, seeded.PICK_SCORE])
def test_each_clip_has_the_tensors_of_its_authors(repo):
    sizes = seeded.PUBLISHED[seeded.CLIP_H if repo == seeded.PICK_SCORE else repo]
    (state,) = published(repo).values()
    assert shapes(to_open_clip(state)) == seeded.clip_shapes(*sizes, 49408)


def test_hps_has_open_clips_tensors():
    expected = seeded.clip_shapes(*seeded.PUBLISHED[seeded.CLIP_H], 49408)
    assert [shapes(state) for state in published(seeded.HPS).values()] == [expected] * 2


def test_image_reward_has_its_authors_tensors_and_an_old_buffer():
    expected = seeded.image_reward_shapes(seeded.MED_CONFIG, *seeded.PUBLISHED_BLIP["vision"])
    expected["blip.text_encoder.embeddings.position_ids"] = (1, 512)
    assert one(seeded.IMAGE_REWARD) == expected


def test_the_aesthetic_head_has_its_authors_tensors():
    assert one(seeded.AESTHETIC) == seeded.head_shapes(768)


def test_dino_has_the_tensors_of_its_authors_under_the_names_of_the_converted_file():
    expected = {}
    for key, shape in seeded.vit_shapes(384, 12).items():
        for old, new in seeded.DINO_KEYS:
            key = key.replace(old, new)
        if "attn.qkv" in key:
            third = (shape[0] // 3, *shape[1:])
            expected |= {key.replace("attn.qkv", f"attention.attention.{n}"): third for n in ("query", "key", "value")}
        else:
            expected[f"layer{key}" if key.startswith("norm.") else key] = shape
    assert one(seeded.DINO) == expected


def test_spos_preference_model_is_a_clip_h_with_six_numbers_per_layer_and_width_and_two_at_the_end():
    state = one("SPO-Diffusion-Models/Step-Aware_Preference_Models")
    clip = {key.removeprefix("model."): v for key, v in state.items() if "adaLN" not in key and "t_embedder" not in key}
    assert clip == one(seeded.CLIP_H)
    more = {key: shape for key, shape in state.items() if key.removeprefix("model.") not in clip}
    weights = sorted(shape for key, shape in more.items() if key.endswith("weight"))
    assert weights == sorted([(1280, 256), (1280, 1280), *[(7680, 1280)] * 32, (2560, 1280)])


def test_the_small_files_have_the_same_names_and_keys_as_the_published_ones():
    """As far as there are as many layers: numbers apart, no key of a small file is unknown to the published one."""
    for repo in WEIGHTS:
        small, full = WEIGHTS[repo](rehearsal_small, CONFIG), published(repo)
        assert list(small) == list(full)
        for file in small:
            kinds = [{re.sub(r"\d+", "0", key) for key in state} for state in (small[file], full[file])]
            assert kinds[0] <= kinds[1], (repo, file)


# ---- what is drawn ----


def test_a_tensor_depends_on_its_name_alone_and_keeps_the_size_of_what_goes_through_it():
    wanted = torch.empty(300, 400, device="meta", dtype=torch.float16)
    x = drawn("a.weight", wanted, "0:repo:file:a.weight")
    assert torch.equal(x, drawn("a.weight", wanted, "0:repo:file:a.weight"))
    assert not torch.equal(x, drawn("a.weight", wanted, "1:repo:file:a.weight"))
    assert x.dtype == torch.float16 and x.shape == (300, 400)
    y = x.float() @ torch.randn(400, 50)
    assert y.std().item() == pytest.approx(1, rel=0.05)
    norm = drawn("n.weight", torch.empty(1000, device="meta"), "n")
    assert norm.mean().item() == pytest.approx(1, abs=0.02) and norm.std() > 0.05


# ---- small networks, written and loaded ----


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder whose hub holds every repository that the four tables need, written by the command's code."""
    folder = tmp_path_factory.mktemp("results")
    root = hub_dir("rehearsal", folder)
    for repo in needed(CONFIG):
        write_repository(CONFIG, repo, root)
    return folder


@pytest.fixture(scope="module")
def root(results):
    return hub_dir("rehearsal", results)


def test_every_model_of_the_four_tables_loads_with_the_weights_of_its_files(root):
    names = sorted({job.model for job in jobs(CONFIG)})
    assert len(names) == 14
    for name in names:
        policy = load_policy(CONFIG.models[name], Hub(root), name=name)
        state = policy.unet.state_dict()
        assert all(value.isfinite().all() for value in state.values())
        if not (CONFIG.models[name].deltas or CONFIG.models[name].loras):
            for key, value in unet_file(root, name).items():
                torch.testing.assert_close(state[key], value.float(), rtol=0, atol=0)


def unet_file(root, model: str) -> dict:
    """The state dict that a model's entry points to."""
    entry = CONFIG.models[model]
    source, base = entry.unet, root / entry.base / "unet"
    if source is not None and source.file is not None:
        return torch.load(root / source.repo / source.file, weights_only=True)
    folder = base if source is None else root / source.repo / (source.subfolder or "")
    (path,) = folder.glob("diffusion_pytorch_model*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdxl_turbo", "sdxl_lcm", "sdxl_dpo_dmd2_lora"])
def test_a_forward_pass_is_finite_and_not_zero(root, name, dtype):
    policy = load_policy(CONFIG.models[name], Hub(root), dtype, name=name)
    condition = policy.encode_prompts(["a red cat", "a robot at night"])
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    chain = toy.Renoise(toy.TIMES)
    eps = policy.eps(chain, torch.tensor([4, 2]), x, condition)
    pictures = policy.decode(x)
    assert eps.isfinite().all() and 0.1 < eps.std() < 10
    assert pictures.float().std() > 1 and not torch.equal(condition.pooled[0], condition.pooled[1])


def test_every_metric_of_the_tables_loads_and_tells_pictures_and_prompts_apart(root):
    names = [*metrics(CONFIG, "preference"), *metrics(CONFIG, "concept"), "spm_released"]
    assert {"pick_score", "image_reward", "hps_v21", "aesthetic_score", "dino", "clip_t"} <= set(names)
    pictures, prompts = toy.pictures(2), ["a red cat by the sea", "two robots"]
    for name in dict.fromkeys(names):
        scorer = load_metric(name, CONFIG.metrics[name], Hub(root), "cpu")
        others = [] if CONFIG.metrics[name].compared_with is None else [[[picture] for picture in pictures[::-1]]]
        found = scorer.score(pictures, prompts, *others)
        assert found.shape == (2,) and found.isfinite().all()
        assert others or found[0] != found[1], name


def test_the_random_weights_of_scorers_with_one_architecture_differ(root):
    clips = [load_file(root / repo / "model.safetensors") for repo in (seeded.CLIP_H, seeded.PICK_SCORE)]
    assert shapes(clips[0]) == shapes(clips[1])
    assert not torch.equal(clips[0]["visual_projection.weight"], clips[1]["visual_projection.weight"])


def test_data_are_there_in_the_numbers_asked_for(root):
    asked, hub = CONFIG.scale_entry.random, Hub(root)
    entry = CONFIG.datasets["pickapic_v2"]
    pairs = iter_pairs(hub.files(entry.repo, entry.files), entry, "pickapic_v2")
    kept = list(pairs)
    assert pairs.counts.rows == asked.num_pairs and pairs.counts.dropped["tie"] == asked.num_pairs // 8
    assert len({pair.prompt for pair in kept}) == len(kept) and not pairs.quarantine
    (path,) = hub.files("yuvalkirstain/pickapic_v1_no_images", "data/test_unique-*.parquet")
    assert pq.read_metadata(path).num_rows == asked.num_prompts
    subject = load_subject(hub, CONFIG.datasets["dreambooth_prompts"], "dreambooth_prompts", "dog")
    assert subject.live and len(subject.prompts()) == asked.num_prompts and len(subject.images) == 4


def test_the_test_prompts_are_in_no_training_set(root):
    from pso.caches import load_prompt_set

    sets = {
        name: {p.text for p in load_prompt_set(Hub(root), CONFIG.datasets[name], name)}
        for name in ("training_prompts_4k", "pickapic_test", "pickapic_validation", "parti_prompts")
    }
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == 16 + 3 * 2


def test_a_repository_without_a_twin_and_a_scale_without_random_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^no/such has no random twin; expected one of "):
        write_repository(CONFIG, "no/such", tmp_path)
    with pytest.raises(UserError, match=r"^scales\.smoke\.random is missing"):
        write_repository(load({"scale": "smoke"}), DMD2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lora_that_psos_authors_published_is_a_row_that_nothing_is_trained_for(root):
    asked = load({**SMALL, "tables": ["released"]})
    assert {job.method for job in jobs(asked)} == {UNTUNED}
    for repo in needed(asked).keys() - needed(CONFIG).keys():
        write_repository(asked, repo, root)
    with_it, without = (
        load_policy(asked.models[name], Hub(root), name=name).unet.state_dict()
        for name in ("sdxl_dmd2_pso_released", "sdxl_dmd2")
    )
    changed = {key for key, value in with_it.items() if not torch.equal(value, without[key])}
    assert changed == {key for key in without if re.search(r"\.to_(q|k|v|out\.0)\.weight$", key)}


def test_a_mirror_is_rehearsed_with_the_files_of_its_original(tmp_path):
    for repo, mirror in (
        ("yuvalkirstain/pickapic_v2", "liuhuohuo2/pick-a-pic-v2"),
        (seeded.BERT, "google-bert/bert-base-uncased"),
    ):
        files, copies = write_repository(CONFIG, repo, tmp_path), write_repository(CONFIG, mirror, tmp_path)
        assert files == copies and (tmp_path / mirror / copies[0]["file"]).is_file()


# ---- the tokenizers at published size ----


def test_clips_tokenizer_at_published_size_has_49408_tokens_with_the_end_last(tmp_path):
    from eval.clip_model import load_tokenizer
    from pso.tokenizer_files import merges_for, write_tokenizer

    assert write_tokenizer(tmp_path, merges_for(49408), pad="!") == 49408
    tokenizer = load_tokenizer(tmp_path, 49408)
    assert isinstance(tokenizer, CLIPTokenizer)
    ids = tokenizer("a red cat, number 12")["input_ids"]
    assert (ids[0], ids[-1]) == (49406, 49407) and max(ids[:-1]) == 49406 and len(ids) < 77
    assert tokenizer.pad_token == "!"


def test_berts_tokenizer_has_30522_words(root):
    assert len(BertTokenizer.from_pretrained(root / seeded.BERT)) == 30522


# ---- commands ----


@pytest.fixture
def command(monkeypatch):
    """A command as `python -m` runs it, in this process."""

    def call(module: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()

    return call


@pytest.mark.parametrize("repo", [DMD2, "RockeyCoss/SPO"])
def test_the_command_writes_the_step_with_what_was_written(command, tmp_path, repo):
    command("pso.rehearsal", "--repo", repo, "--results", str(tmp_path), "--set", json.dumps(SMALL))
    step = hub_dir("rehearsal", tmp_path) / "repositories" / f"{slug(repo)}.json"
    record = json.loads(step.read_text())
    folder = hub_dir("rehearsal", tmp_path) / repo
    assert {f["file"] for f in record["files"]} == {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
    }
    assert all(len(f["sha256"]) == 64 and f["size"] > 0 for f in record["files"])
    assert record["cost"]["wall_s"] > 0 and str(tmp_path) not in step.read_text()


def test_two_runs_are_tuned_and_a_model_generated_and_scored_by_the_commands(command, results):
    given = ["--results", str(results), "--set", json.dumps({"tables": ["table2"], **SMALL})]
    command("pso.caches", "--model", "sdxl_turbo", "--dataset", "pickapic_v2", *given)
    command("pso.texts", "--model", "sdxl_turbo", *given)  # also of sdxl_turbo_dpo_delta, which has its base
    for method in ("pso_offline", "pso_online"):
        command("pso.tune", "--model", "sdxl_turbo", "--method", method, *given)
        folder = results / "rehearsal" / "preference" / "sdxl_turbo" / method / "seed0"
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        updates = [line for line in lines if line["event"] == "update"]
        assert len(updates) == 2 and updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert all(0 < line["grad_norm"] < 1e3 for line in updates)
        trained = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
        assert any(value.abs().max() > 0 for key, value in trained.items() if "lora_B" in key)
    command("eval.generate", "--model", "sdxl_turbo_dpo_delta", *given)
    command("eval.score", "--model", "sdxl_turbo_dpo_delta", *given)
    row = results / "rehearsal" / "preference" / "sdxl_turbo_dpo_delta" / UNTUNED / "seed0"
    for metric in ("pick_score", "clip_score", "image_reward", "aesthetic_score", "hps_v21"):
        scores = pq.read_table(row / f"scores/parti_prompts/steps4/{metric}.parquet")
        assert scores.num_rows == 2 and np.isfinite(scores["score"].to_numpy()).all()


# ---- its cost ----


def test_the_cost_of_a_gpu_is_a_column_where_a_job_had_one(tmp_path):
    base = tmp_path / "rehearsal"
    config = load({"scale": "rehearsal", "tables": ["table2"]})
    records = {f"hub/repositories/{slug(DMD2)}": {"wall_s": 60.0, "cpu_s": 50.0, "peak_rss_gib": 11.0}}
    for job in jobs(config):
        where = job.folder("rehearsal", tmp_path).relative_to(base)
        if job.method != UNTUNED:
            records[f"{where}/run"] = {"wall_s": 5, "cpu_s": 4, "peak_rss_gib": 1, "peak_gpu_gib": 33.25}
        for what in ("images", "scores"):
            records[f"preference/{job.model}/{what}"] = {"wall_s": 5, "cpu_s": 4, "peak_rss_gib": 1, "peak_gpu_gib": 9}
    for name, found in records.items():
        path = base / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cost": found}))
    by_stage, by_job = cost.tables(config, tmp_path)
    assert "peak GPU GiB" in by_stage and "random weights" in by_stage
    assert re.search(r"sum.*\| +33\.25 \|", by_stage) and re.search(
        r"tianweiy--DMD2 +\| +60 \| +50 \| +11\.00 \| +\|", by_job
    )
    for name, found in records.items():
        (base / f"{name}.json").write_text(json.dumps({"cost": {k: v for k, v in found.items() if k != cost.GPU}}))
    assert "GPU" not in cost.tables(config, tmp_path)[0]


def test_the_module_names_both_sizes():
    assert set(rehearsal.NETWORKS) == {"published", "small"}

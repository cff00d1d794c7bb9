"""The stand-in world: pictures and the oracle that reads them, tokenizer, VAE, preference pairs, schedules."""

import dataclasses
import io
import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from transformers import CLIPTokenizer

from pso.miniature import data, oracle, world
from pso.miniature.common import Average, learning_rate, pixels, steps
from pso.miniature.text import BOS, EOS, WINDOW, write_tokenizer
from pso.miniature.vae import SCALING_FACTOR, new_vae, standardise
from pso.standin_entries import Fit

FIELDS = ("shape", "colour", "background", "position")


# ---- captions and splits ----


def test_splits_are_disjoint_and_complete():
    parts = [world.split(name) for name in world.SPLITS]
    together = [a for part in parts for a in part]
    assert len(together) == len(set(together)) == len(world.ALL_ATTRIBUTES) == 3 * 36
    assert [len(part) for part in parts] == [36, 24, 24, 24]
    assert set(together) == set(world.ALL_ATTRIBUTES)


@pytest.mark.parametrize("name", world.SPLITS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_split_shows_every_value_equally_often(name, field):
    counts = Counter(getattr(a, field) for a in world.split(name))
    assert set(counts) == set(data.OPTIONS[field])
    assert len(set(counts.values())) == 1


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=rf"^split is 'tset'; expected one of {', '.join(world.SPLITS)}$"):
        world.split("tset")


def test_a_caption_belongs_to_one_combination_and_template():
    captions = [a.caption(t) for a in world.ALL_ATTRIBUTES for t in range(len(world.TEMPLATES))]
    assert len(set(captions)) == len(captions) == len(world.OF_CAPTION) == 432


def test_a_caption_names_what_its_picture_shows_and_nothing_else():
    words = {w: f for f in FIELDS for w in data.OPTIONS[f]}
    for caption, attributes in world.OF_CAPTION.items():
        named = [w for w in caption.replace(",", " ").replace(":", " ").split() if w in words]
        assert sorted(named) == sorted(vars(attributes).values()), caption


# ---- pictures ----

NUM = 1000


@pytest.fixture(scope="module")
def seen():
    """Pictures, their attributes, their glow and size, and what the oracle sees."""
    images, _, attributes, hidden = world.render_many(NUM, 11)
    return images, attributes, hidden, oracle.look(images)


def test_the_same_seed_draws_the_same_pictures():
    (one, captions, *_), (other, again, *_) = world.render_many(20, 3), world.render_many(20, 3)
    assert np.array_equal(one, other) and captions == again
    assert not np.array_equal(one, world.render_many(20, 4)[0])


def test_the_oracle_recognises_rendered_pictures(seen):
    _, attributes, _, found = seen
    assert found.accuracy(attributes).mean() >= 0.985


def test_the_oracle_measures_the_rim(seen):
    _, _, hidden, found = seen
    assert np.corrcoef(found.glow, hidden[:, 0])[0, 1] > 0.9


def test_the_oracle_measures_the_size(seen):
    _, _, hidden, found = seen
    assert np.corrcoef(found.size, hidden[:, 1])[0, 1] > 0.8
    assert abs((found.size - hidden[:, 1]).mean()) < 0.25


def test_texture_of_rendered_pictures_is_about_one(seen):
    assert seen[3].texture.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("field", FIELDS)
def test_a_caption_that_is_wrong_in_one_word_is_rejected(seen, field):
    _, attributes, _, found = seen
    options = data.OPTIONS[field]
    wrong = [
        dataclasses.replace(a, **{field: options[(options.index(getattr(a, field)) + 1) % len(options)]})
        for a in attributes
    ]
    assert found.accuracy(wrong).mean() <= 0.005


def test_a_picture_without_a_shape_shows_nothing():
    rng = np.random.default_rng(0)
    empty = np.clip(np.array([34, 32, 38]) + 18 * rng.choice([-1, 1], (4, 32, 32, 1)), 0, 255).astype(np.uint8)
    attributes = [a for a in world.ALL_ATTRIBUTES if a.background == "black"]
    found = oracle.look(empty)
    assert all(found.accuracy([a] * 4).sum() == 0 for a in attributes)


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(radius))) for i in images])


def test_texture_falls_with_every_step_of_blur(seen):
    levels = [oracle.look(blurred(seen[0][:100], radius)).texture.mean() for radius in (0.5, 1.0, 2.0)]
    assert seen[3].texture[:100].mean() > levels[0] > levels[1] > levels[2] and levels[1] < 0.6


def test_texture_is_gone_where_the_grain_is_its_mean(seen, monkeypatch):
    monkeypatch.setattr(world, "GRAIN_LEVELS", 0.0)  # the same draws, without their effect
    flat, _, attributes, _ = world.render_many(200, 11)
    monkeypatch.undo()
    found = oracle.look(flat)
    assert found.texture.max() < 0.15 and found.texture.mean() < 0.02
    assert found.accuracy(attributes).mean() >= 0.985, "nothing else is lost"


def test_utility_is_alignment_then_rim_and_size(seen):
    _, attributes, _, found = seen
    expected = 2 * found.accuracy(attributes) + found.glow + (found.size - 7.5) / 3
    assert np.allclose(found.utility(attributes), expected)


@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 31, 32, 3), (2, 32, 32), (2, 3, 32, 32), (2, 64, 64, 3)])
def test_pictures_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError) as caught:
        oracle.look(np.zeros(shape, np.uint8))
    assert str(caught.value) == f"images have shape {shape}; expected [B, 32, 32, 3]"


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"^shape is 'square'; expected one of circle, triangle, cross$"):
        world.signed_distance("square", 6.0, 0.0, 0.0)


# ---- tokenizer ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made / "first")
    write_tokenizer(made / "second", pad="!")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder / "first")


def test_a_caption_comes_back_from_its_tokens(tokenizer):
    for caption in world.OF_CAPTION:
        text = tokenizer.decode(tokenizer(caption)["input_ids"], skip_special_tokens=True)
        assert text.replace(" ,", ",").replace(" :", ":") == caption


def test_a_word_of_the_world_is_one_token(tokenizer):
    for caption in world.OF_CAPTION:
        words = caption.replace(",", " ,").replace(":", " :").split()
        assert len(tokenizer(caption)["input_ids"]) == len(words) + 2


def test_every_caption_fits_the_window(tokenizer):
    assert max(len(tokenizer(caption)["input_ids"]) for caption in world.OF_CAPTION) <= WINDOW
    assert tokenizer.model_max_length == WINDOW


def test_different_captions_have_different_tokens(tokenizer):
    assert len({tuple(tokenizer(c)["input_ids"]) for c in world.OF_CAPTION}) == len(world.OF_CAPTION)


def test_the_end_of_the_text_has_the_highest_id(tokenizer):
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_size_is_that_of_the_vocabulary_file(folder, name):
    vocabulary = json.loads((folder / name / "vocab.json").read_text())
    loaded = CLIPTokenizer.from_pretrained(folder / name)
    assert len(loaded) == loaded.vocab_size == len(vocabulary) > 500
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_the_first_tokenizer_pads_with_the_end_and_the_second_with_an_exclamation_mark(folder, tokenizer):
    second = CLIPTokenizer.from_pretrained(folder / "second")
    assert tokenizer.pad_token == EOS and second.pad_token == "!" != EOS
    ids = second("red", padding="max_length")["input_ids"]
    assert len(ids) == WINDOW and ids[3:] == [second.convert_tokens_to_ids("!")] * (WINDOW - 3)
    assert ids[2] == second.eos_token_id and second.pad_token_id != second.eos_token_id


def bytes_of(tokens: list[str]) -> bytes:
    """GPT-2's table of printable stand-ins, inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(plain)))}
    return bytes(table[c] for token in tokens for c in token.removesuffix("</w>"))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12))
def test_every_byte_of_any_text_has_a_token(tokenizer, text):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    plain = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    kept = "".join(c for c in plain if not c.isspace() or unicodedata.category(c) == "Cc" and c in "\x1c\x1d\x1e\x1f")
    assert tokens[0] == BOS and tokens[-1] == EOS and EOS not in tokens[1:-1]
    assert bytes_of(tokens[1:-1]) == kept.encode()


# ---- VAE ----


@pytest.fixture(scope="module")
def vae_before_and_after():
    """A random VAE on pictures: posterior and reconstruction before and after it is standardised."""
    torch.manual_seed(0)
    vae, x = new_vae().eval(), pixels(world.render_many(48, 2)[0])
    found = []
    for turn in range(2):
        if turn:
            standardise(vae, x)
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
            found.append((posterior, vae.decode(posterior.mean).sample))
    return vae, *found


def test_scaled_latents_have_mean_0_and_std_1_per_channel(vae_before_and_after):
    vae, _, (posterior, _) = vae_before_and_after
    scaled = vae.config.scaling_factor * posterior.mean
    assert vae.config.scaling_factor == SCALING_FACTOR
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(12), atol=1e-4)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(12), atol=1e-4)


def test_latents_were_not_standard_before(vae_before_and_after):
    vae, (posterior, _), _ = vae_before_and_after
    scaled = vae.config.scaling_factor * posterior.mean
    assert (scaled.std((0, 2, 3)) - 1).abs().min() > 0.1 and scaled.mean((0, 2, 3)).abs().max() > 1e-3


def test_standardising_leaves_the_decoded_picture_unchanged(vae_before_and_after):
    _, (_, before), (_, after) = vae_before_and_after
    assert before.std() > 1e-3 and torch.allclose(before, after, atol=2e-4 * before.abs().max().item())


def test_standardising_scales_the_posteriors_spread_with_its_mean(vae_before_and_after):
    _, (before, _), (after, _) = vae_before_and_after
    spread = before.mean.std((0, 2, 3)) * SCALING_FACTOR
    assert torch.allclose(after.std, before.std / spread[:, None, None], rtol=1e-3)


# ---- preference pairs ----


@pytest.fixture(scope="module")
def drawn():
    """Rows, and the true utilities of their two pictures (n, 2)."""
    utilities, picture = [], data.picture

    def noted(*given):
        image, utility = picture(*given)
        utilities.append(utility)
        return image, utility

    data.picture = noted
    try:
        rows = list(data.pairs(800, 4))
    finally:
        data.picture = picture
    return rows, np.array(utilities).reshape(-1, 2)


def decided(drawn):
    """Difference of utilities and label of the rows that are no ties."""
    rows, utilities = drawn
    label = np.array([r["label_0"] for r in rows])
    difference = utilities[:, 0] - utilities[:, 1]
    return difference[label != 0.5], label[label != 0.5]


def test_a_row_has_the_columns_of_pick_a_pic(drawn):
    rows, _ = drawn
    names = {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "ranking_id"}
    assert all(set(r) == names for r in rows)
    assert [r["ranking_id"] for r in rows] == list(range(len(rows)))


@pytest.mark.parametrize("name", world.SPLITS[1:])
def test_a_test_asks_for_each_picture_once(name):
    asked = [world.OF_CAPTION[p.text] for p in data.captions(name, 24)]
    assert len(set(asked)) == len(asked) == 24 and set(asked) == set(world.split(name))


def test_training_prompts_have_every_wording():
    assert len({p.text for p in data.captions("training", 144)}) == 144


def test_captions_of_pairs_are_of_the_training_split(drawn):
    assert {world.OF_CAPTION[r["caption"]] for r in drawn[0]} == set(world.split("training"))


def test_pictures_of_pairs_are_whole(drawn):
    for key in ("jpg_0", "jpg_1"):
        assert np.asarray(Image.open(io.BytesIO(drawn[0][0][key]))).shape == (32, 32, 3)


def test_labels_of_a_pair_are_one_preference_or_a_tie(drawn):
    assert {(r["label_0"], r["label_1"]) for r in drawn[0]} == {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}


def test_ties_are_the_pairs_that_nobody_can_tell_apart(drawn):
    rows, utilities = drawn
    tied = np.array([r["label_0"] == 0.5 for r in rows])
    assert np.array_equal(tied, np.abs(utilities[:, 0] - utilities[:, 1]) < 0.12)
    assert 0.05 < tied.mean() < 0.2


def test_labels_are_noisy_as_bradley_terry_says(drawn):
    difference, label = decided(drawn)
    p = 1 / (1 + np.exp(-6 * difference))
    assert abs((label - p).sum()) < 3 * np.sqrt((p * (1 - p)).sum())
    close = np.abs(difference) < 0.5
    right = np.where(difference > 0, label, 1 - label)
    expected = np.maximum(p, 1 - p)
    assert abs((right - expected)[close].sum()) < 3 * np.sqrt((p * (1 - p))[close].sum()) and right[close].mean() < 0.97


def test_the_noise_has_the_stated_temperature(drawn):
    difference, label = decided(drawn)
    signed = np.where(label == 1, difference, -difference)
    likelihood = {t: -np.log1p(np.exp(-signed / t)).sum() for t in (1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3)}
    assert max(likelihood, key=likelihood.get) == data.TEMPERATURE == 1 / 6


def test_a_picture_with_a_wrong_word_costs_two(drawn):
    rng = np.random.default_rng(0)
    wanted = world.split("training")[0]
    images, utilities = zip(*(data.picture(wanted, rng) for _ in range(300)), strict=True)
    right = oracle.look(np.stack(images)).accuracy([wanted] * 300)
    assert right.mean() == pytest.approx(1 - data.WRONG, abs=0.08)
    assert np.mean(np.array(utilities)[right == 1]) - np.mean(np.array(utilities)[right == 0]) == pytest.approx(
        2, abs=0.2
    )


# ---- schedules and averages ----


@pytest.mark.parametrize(
    ("done", "hold", "expected"),
    [(0.025, 0.05, 0.5), (0.05, 0.05, 1.0), (0.525, 0.05, 0.51), (1.0, 0.05, 0.02), (0.3, 0.5, 1.0), (0.75, 0.5, 0.51)],
)
def test_the_learning_rate_at_known_places(done, hold, expected):
    assert learning_rate(done, 0.05, hold) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([(0.05, 0.05), (0.05, 0.5), (0.1, 0.3)]))
def test_the_learning_rate_rises_then_never_rises_again(a, b, shape):
    first, second = sorted((a, b))
    one, other = learning_rate(first, *shape), learning_rate(second, *shape)
    assert 0 <= one <= 1 + 1e-12
    if second < shape[0]:
        assert one <= other
    elif first >= shape[0]:
        assert one >= other >= 0.02 - 1e-12


def test_descending_follows_the_schedule():
    parameter = torch.nn.Parameter(torch.tensor([100.0]))
    positions = []
    for _, descend in steps("x", [parameter], Fit(num_steps=20, batch_size=1, learning_rate=0.5), warm_up=0.2):
        positions.append(parameter.item())
        descend(parameter.sum())  # constant gradient: AdamW moves by the learning rate
    moved = -np.diff([*positions, parameter.item()]) / 0.5
    assert moved == pytest.approx([learning_rate((k + 1) / 20, 0.2, 0.05) for k in range(20)], abs=1e-3)


def test_the_average_is_the_textbooks_with_a_warm_up():
    values = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(3))
    average, expected = Average([parameter], 0.8), np.zeros(3)
    for n, value in enumerate(values, 1):
        parameter.data.copy_(torch.from_numpy(value))
        average.update()
        decay = min(0.8, n / (9 + n))
        expected = decay * expected + (1 - decay) * value
    average.apply()
    assert parameter.detach().numpy() == pytest.approx(expected, abs=1e-5)

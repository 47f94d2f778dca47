import json
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sa_diffusers import SampleGenerator, SampleSet, SamplingSettings, objective_for, pair_concepts
from sa_diffusers.data.generation import count_black, surrogate_requests, takes_concept
from sa_diffusers.data.sample_set import MANIFEST_NAME
from sa_diffusers.data.sensitive import blurred
from sa_diffusers.evaluation.groups import PromptGroup
from sa_diffusers.evaluation.scoring import sample_groups, score_groups
from sa_diffusers.files import read_sealed, write_sealed

from .conftest import REPOSITORY, build_tiny_pipeline
from .nursery import forked_code

SETTINGS = SamplingSettings(num_inference_steps=2, batch_size=4)
PROMPTS = ["cat", "dog", "cow", "pig", "hen", "fox"]


@pytest.fixture
def generator(tiny_objective, tmp_path):
    return SampleGenerator(tiny_objective, tmp_path / "artifacts", Accelerator())


def test_bit_identical_at_equal_batching(tiny_objective):
    first, second = (tiny_objective.sample(PROMPTS, range(6), SETTINGS) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm", "euler", "dpmsolver++", "dpmsolver++_logsnr", "unipc"])
def test_an_images_randomness_is_its_seeds_whatever_the_batch(tiny_objective, sampler):
    settings = [SamplingSettings(sampler, 3, 7.5, batch_size=size) for size in (1, 4)]
    alone, together = (tiny_objective.sample(PROMPTS, range(6), setting) for setting in settings)
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)


def test_pictures_equal_those_of_the_plain_pipeline(tiny_objective):
    pipeline = build_tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline("cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    found = tiny_objective.decode(tiny_objective.sample(["cat"], [3], SETTINGS))[0]
    assert found.tobytes() == expected.tobytes()


def test_the_safety_checker_takes_no_part_and_is_saved_unchanged(tmp_path):
    pipeline = build_tiny_pipeline(safety_checker=True)
    pipeline.set_progress_bar_config(disable=True)
    assert count_black(pipeline("cat", num_inference_steps=2).images) == 1
    objective = objective_for(pipeline)
    assert count_black(objective.decode(objective.sample(["cat"], [0], SETTINGS))) == 0
    objective.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    saved = type(pipeline.safety_checker).from_pretrained(tmp_path / "saved" / "safety_checker")
    for name, value in pipeline.safety_checker.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)


def test_black_pictures_are_counted():
    assert count_black([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")]) == 1


def test_a_set_is_kept_with_viewable_pictures_and_reused(generator, tmp_path):
    made = generator.prompted("replay", PROMPTS, PROMPTS, 0, SETTINGS)
    (folder,) = (tmp_path / "artifacts").iterdir()
    assert len(list((folder / "preview").glob("*.png"))) == len(PROMPTS)
    assert made.black_images == 0
    stamp = (folder / MANIFEST_NAME).stat().st_mtime_ns
    again = generator.prompted("replay", PROMPTS, PROMPTS, 0, SETTINGS)
    assert torch.equal(made.samples, again.samples)
    assert (folder / MANIFEST_NAME).stat().st_mtime_ns == stamp


def test_a_preview_is_blurred_or_not_as_the_present_run_asks(generator, tmp_path):
    """Clear pictures of an earlier run do not stay where a later one blurs; the samples are the same."""
    artifacts = tmp_path / "artifacts"

    def made(blur):
        generator.blur = blur
        samples = generator.prompted("replay", PROMPTS, PROMPTS, 0, SETTINGS)
        (folder,) = artifacts.iterdir()
        assert SampleSet.load(folder).fingerprint == samples.fingerprint
        with Image.open(folder / "preview" / "0000.png") as picture:
            return samples.samples, np.asarray(picture), (folder / MANIFEST_NAME).stat().st_mtime_ns

    samples, clear, _ = made(False)
    same, veiled, stamp = made(True)
    assert torch.equal(samples, same)
    assert np.array_equal(np.asarray(blurred(Image.fromarray(clear))), veiled)
    assert made(True)[2] == stamp
    assert np.array_equal(made(False)[1], clear)
    # Sets of before do not say what they are: none of theirs is taken for blurred.
    (folder,) = artifacts.iterdir()
    manifest = read_sealed(folder, MANIFEST_NAME, 2, "")
    (folder / MANIFEST_NAME).unlink()
    write_sealed(folder, MANIFEST_NAME, 2, {name: manifest[name] for name in manifest.keys() - {"blurred"}})
    unsaid = (folder / MANIFEST_NAME).stat().st_mtime_ns
    assert made(False)[2] == unsaid
    assert np.array_equal(made(True)[1], veiled)


def test_only_what_is_looked_at_is_decoded(generator, monkeypatch):
    """Twenty samples have sixteen pictures in their preview; a set without a preview has none."""
    decoded, decode = [], generator.objective.decode

    def counting(samples):
        decoded.append(len(samples))
        return decode(samples)

    monkeypatch.setattr(generator.objective, "decode", counting)
    prompts = [f"thing {number}" for number in range(20)]
    generator.prompted("replay", prompts, prompts, 0, SETTINGS)
    assert sum(decoded) == 16
    made = generator.drawn("evaluation", PROMPTS, PROMPTS, range(6), SETTINGS, preview=False)
    assert sum(decoded) == 16
    assert made.black_images is None


def test_a_model_that_yields_no_numbers_is_refused_and_nothing_of_it_is_kept(generator, tmp_path):
    sample = generator.objective.sample

    def broken(prompts, seeds, settings):
        samples = sample(prompts, seeds, settings)
        samples[list(prompts).index("hen")] = float("nan")
        return samples

    generator.objective.sample = broken
    with pytest.raises(FloatingPointError, match='samples of "hen" are not finite, and none is kept. precision is not'):
        generator.prompted("replay", PROMPTS[4:], PROMPTS[4:], 0, SETTINGS)
    assert not [*(tmp_path / "artifacts").glob("replay*")]


def test_black_pictures_of_a_broken_decoder_are_counted_wherever_pictures_are_looked_at(generator, tmp_path):
    def black(samples):
        return [Image.new("RGB", (16, 16)) for _ in samples]

    generator.objective.decode = black
    assert generator.prompted("replay", PROMPTS, PROMPTS, 0, SETTINGS).black_images == len(PROMPTS)
    groups = [PromptGroup("cat", "concept", [*PROMPTS, *PROMPTS, *PROMPTS], range(18))]
    kept = sample_groups(generator.objective, groups, SETTINGS, tmp_path / "artifacts", generator.accelerator)
    (drawn,) = score_groups(generator.objective, groups, kept)
    assert drawn.black == 18


@pytest.mark.parametrize("change", ["prompts", "seed", "guidance", "model"])
def test_a_set_is_drawn_again_when_what_it_depends_on_changes(generator, change, tmp_path):
    generator.prompted("replay", PROMPTS, PROMPTS, 0, SETTINGS)
    prompts = [*PROMPTS[:-1], "owl"] if change == "prompts" else PROMPTS
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=1.0) if change == "guidance" else SETTINGS
    if change == "model":
        with torch.no_grad():
            next(generator.objective.module.parameters()).add_(1.0)
        generator = SampleGenerator(generator.objective, tmp_path / "artifacts", Accelerator())
    generator.prompted("replay", prompts, prompts, 1 if change == "seed" else 0, settings)
    assert len(list((tmp_path / "artifacts").iterdir())) == 2


def test_surrogates_are_drawn_from_the_surrogate_and_trained_as_the_concept(generator):
    pairs = pair_concepts(["cat", "dog"], ["a cow", "a pig"])
    made = generator.surrogates(pairs, ["{}", "a photo of a {}"], 8, 0, SETTINGS)
    assert made.conditions[:4] == ["cat", "dog", "a photo of a cat", "a photo of a dog"]
    assert made.sources[:4] == ["a cow", "a pig", "a photo of a cow", "a photo of a pig"]
    expected = generator.objective.sample(made.sources, made.seeds, SETTINGS)
    torch.testing.assert_close(made.samples, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("templates", [["{}"], ["{}", "a {}"], ["{}", "a {}", "one {}"]])
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_each_concept_has_its_share_of_own_samples_in_every_phrasing(templates, share):
    pairs = pair_concepts(["cat", "dog"], ["a cow", "a pig"])
    count = 2 * 12 * len(templates)
    own = takes_concept(pairs, templates, count, share)
    chosen, conditions, _ = surrogate_requests(pairs, templates, count)
    assert len(own) == count
    for concept in ("cat", "dog"):
        for template in templates:
            rows = [place for place, prompt in enumerate(conditions) if prompt == template.format(concept)]
            assert sum(own[place] for place in rows) == share * len(rows), (concept, template)


def test_a_concepts_own_samples_stand_among_its_surrogates_and_have_their_teacher(generator):
    pairs = pair_concepts(["cat"], ["a cow"])
    alone = generator.surrogates(pairs, ["{}"], 4, 0, SETTINGS)
    own = [False, True, False, True]
    made = generator.surrogates(pairs, ["{}"], 4, 0, SETTINGS, own)
    assert made.conditions == ["cat"] * 4
    assert made.sources == alone.sources == ["a cow"] * 4
    assert made.are_own == own
    assert alone.are_own == [False] * 4
    assert made.fingerprint != alone.fingerprint
    expected = generator.objective.sample(["a cow", "cat", "a cow", "cat"], alone.seeds, SETTINGS)
    torch.testing.assert_close(made.samples, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.samples[::2], alone.samples[::2], rtol=1e-3, atol=1e-3)
    assert (made + alone).are_own == own + [False] * 4
    assert (alone + made).subset([5, 0]).are_own == [True, False]


def test_which_samples_are_a_concepts_own_is_kept(generator, tmp_path):
    made = generator.surrogates(pair_concepts(["cat"], ["a cow"]), ["{}"], 4, 0, SETTINGS, [False, True, False, True])
    made.save(tmp_path / "set")
    again = SampleSet.load(tmp_path / "set")
    assert again.are_own == made.are_own
    assert again.fingerprint == made.fingerprint


def test_surrogates_are_replayed_under_the_prompt_that_drew_them():
    samples = torch.arange(3.0)[:, None]
    surrogates = SampleSet(samples, ["cat"] * 3, ["a dog", None, "a cow"], [1, 2, 3], {"kind": "x"})
    replay = surrogates.under_their_sources()
    assert replay.conditions == replay.sources == ["a dog", "a cow"]
    assert replay.samples.tolist() == [[0.0], [2.0]]
    assert replay.seeds == [1, 3]
    assert surrogates.conditions == ["cat"] * 3


def test_surrogates_from_a_folder_and_from_noise(generator, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 20), "white").save(folder / "a.png")
    made = generator.surrogates(pair_concepts(["cat", "dog"], [str(folder), "uniform_noise"]), ["{}"], 4, 0, SETTINGS)
    assert made.samples.shape == (4, 4, 8, 8)
    assert sorted(made.conditions) == ["cat", "cat", "dog", "dog"]
    assert made.sources == [None, None, "uniform_noise", "uniform_noise"]
    assert len(made.under_their_sources()) == 0
    noise = made.samples[[made.conditions.index("dog")]]
    white = made.samples[[made.conditions.index("cat")]]
    assert white.std() < noise.std()


def test_an_unreadable_image_is_named(generator, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        generator.surrogates(pair_concepts(["cat"], [str(folder)]), ["{}"], 1, 0, SETTINGS)


def test_a_damaged_or_foreign_set_is_refused(tmp_path):
    made = SampleSet(torch.zeros(1, 2), ["a"], ["a"], [0])
    made.save(tmp_path / "set")
    manifest = tmp_path / "set" / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(ValueError, match="has format 9, this version reads 2"):
        SampleSet.load(tmp_path / "set")
    manifest.unlink()
    with pytest.raises(ValueError, match="is not a set of samples"):
        SampleSet.load(tmp_path / "set")
    with pytest.raises(ValueError, match="must be equally many"):
        SampleSet(torch.zeros(2, 2), ["a"], ["a"], [0])


def test_two_processes_draw_what_one_draws(generator, tmp_path):
    """Whole batches go to processes, so the samples are the same to the bit."""
    alone = generator.prompted("replay", PROMPTS, PROMPTS, 0, SamplingSettings(num_inference_steps=2, batch_size=2))
    script = (
        "import sys\n"
        "from accelerate import Accelerator\n"
        "from sa_diffusers import SampleGenerator, SamplingSettings, objective_for\n"
        "from tests.conftest import build_tiny_pipeline\n"
        "accelerator = Accelerator()\n"
        "assert accelerator.num_processes == 2\n"
        f"generator = SampleGenerator(objective_for(build_tiny_pipeline()), {str(tmp_path / 'two')!r}, accelerator)\n"
        f"generator.prompted('replay', {PROMPTS!r}, {PROMPTS!r}, 0, SamplingSettings(num_inference_steps=2, "
        "batch_size=2))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = forked_code(script, REPOSITORY, environment, processes=2)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "two").iterdir()
    together = SampleSet.load(folder)
    assert together.seeds == alone.seeds
    torch.testing.assert_close(together.samples, alone.samples, rtol=1e-4, atol=1e-5)

import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from sa_diffusers import SampleSet, SamplingSettings, pair_concepts
from sa_diffusers.commands.evaluate import main
from sa_diffusers.evaluation import ImageClassifier, compare, frechet_distance, label_groups, wilson_interval
from sa_diffusers.evaluation.groups import PromptGroup, prompt_groups
from sa_diffusers.evaluation.memory import batch_size_for, in_batches
from sa_diffusers.evaluation.scoring import draw_groups, look_at, sample_groups, score_groups
from sa_diffusers.markup import requoted
from sa_diffusers.publish import build_model_card
from sa_diffusers.report.terminal import format_table
from sa_diffusers.results import Times
from sa_diffusers.results.statistics import moments

from .conftest import run_here
from .test_class_models import BUILDERS, tiny_vae


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A classifier of dark and light pictures, exact by construction."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4],
            depths=[1],
            id2label={0: "dark", 1: "light"},
            label2id={"dark": 0, "light": 1},
        )  # fmt: skip
    ).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures = [Image.new("RGB", (16, 16), (level,) * 3) for level in (20, 230)]
    with torch.no_grad():
        inputs = processor(pictures, return_tensors="pt")
        dark, light = model.resnet(**inputs).pooler_output.flatten(1)
        direction = light - dark
        head = model.classifier[-1]
        head.weight.copy_(torch.stack([-direction, direction]) * 1000)
        middle = (dark + light) / 2 @ direction * 1000
        head.bias.copy_(torch.stack([middle, -middle]))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def class_classifier(tmp_path_factory):
    """A classifier of the tiny models' classes, never trained."""
    folder = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    names = dict(enumerate(tiny_vae().labels))
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    model = ResNetForImageClassification(
        ResNetConfig(**sizes, id2label=names, label2id={v: k for k, v in names.items()})
    )
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["vae", "diffusion"])
def test_what_decodes_in_one_pass_is_told_without_sampler_and_guidance(tmp_path, class_classifier, kind):
    BUILDERS[kind]().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "erased")
    flags = ["--base", "base", "--erased", "erased", "--protocol", "class", "--concept", "cat", "--classifier",
             class_classifier, "--images", "4", "--batch_size", "4", "--num_inference_steps", "3", "--guidance_scale",
             "2.5", "--artifacts_dir", "drawn"]  # fmt: skip
    result = run_here(main, flags, tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "erased" / "evaluation-class"
    report = json.loads((folder / "report.json").read_text())
    texts = [result.stdout, str(build_model_card(tmp_path / "erased"))]
    texts += [(folder / name).read_text() for name in ("report.md", "report.html")]
    for text in texts:
        # The command that made it is as it was typed.
        text = text.replace(shown_command(report), "")
        assert ("one pass of the decoder" in text) == (kind == "vae")
        assert ("ddim" in text) == (kind == "diffusion")
        assert ("guidance" in text) == (kind == "diffusion")
    assert (report["sampling"]["sampler"] == "decoder") == (kind == "vae")


def shown_command(report):
    return requoted(report["command"])


def plain(levels):
    return [Image.new("RGB", (16, 16), (level,) * 3) for level in levels]


def test_wilson_interval_matches_a_known_value():
    # Newcombe (1998), table I: 15 of 148 gives 0.0624 to 0.1605.
    low, high = wilson_interval(15, 148)
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        wilson_interval(3, 2)


def test_frechet_distance_agrees_with_another_formula():
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=(50, 6)) @ generator.normal(size=(6, 6)) for _ in range(2))
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * roots
    found = frechet_distance(*(moments(torch.from_numpy(features)) for features in (first, second)))
    assert found == pytest.approx(expected, rel=1e-6)
    same = moments(torch.from_numpy(first))
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-6)


def test_classifier_scores_and_features(classifier_folder):
    classifier = ImageClassifier(classifier_folder)
    scores = classifier(plain([20, 230, 230]), batch_size=2)
    assert scores.probabilities.argmax(-1).tolist() == [0, 1, 1]
    assert scores.features.shape == (3, 4)
    assert classifier.label_of("a Dark") == 0
    assert classifier.label_of("darkness") is None


def test_labels_that_are_no_thing_to_ask_for_are_told_apart(class_classifier, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(class_classifier, folder)
    classes = tiny_vae().labels
    config = json.loads((folder / "config.json").read_text())
    config["id2label"][str(len(classes) - 1)] = "neither"
    (folder / "config.json").write_text(json.dumps({**config, "labels_without_prompts": ["neither"]}))
    judge = ImageClassifier(folder)
    assert judge.prompted == classes[:-1]
    judge.check_classes(classes, classes[:1])
    pairs = pair_concepts(classes[:1], classes[1:2])
    arguments = (judge.labels, pairs, judge.label_of, ["{}"], ["{}"], 2, 0)
    assert [group.name for group in label_groups(*arguments, prompted=judge.prompted)] == classes[:-1]
    # As a user's wish, it is one row more.
    asked = (judge.labels, pair_concepts(["neither"], classes[:1]), *arguments[2:])
    assert [group.name for group in label_groups(*asked, prompted=judge.prompted)] == judge.labels
    for value in ("neither", ["nothing"], {"neither": True}):
        (folder / "config.json").write_text(json.dumps({**config, "labels_without_prompts": value}))
        with pytest.raises(ValueError, match="labels_without_prompts in its config.json must be a list of its labels"):
            ImageClassifier(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names neither, which are not classes"):
        ImageClassifier(folder).check_classes(classes, classes[:1])


def test_reference_moments_are_those_of_the_pooled_images(classifier_folder, tmp_path):
    generator = np.random.default_rng(0)
    groups = [[Image.fromarray(generator.integers(low, low + 100, (16, 16, 3), dtype=np.uint8)) for _ in range(20)]
              for low in (0, 150)]  # fmt: skip
    classifier = ImageClassifier(classifier_folder)
    classifier.save_reference_features(groups, tmp_path / "reference.safetensors")
    classifier = ImageClassifier(classifier_folder, reference_features=tmp_path / "reference.safetensors")
    pooled = classifier(groups[0] + groups[1]).features.double()
    mean, covariance = classifier.reference_moments([0, 1])
    torch.testing.assert_close(mean, pooled.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariance, torch.cov(pooled.T, correction=0), rtol=0.06, atol=1e-4)


def test_unusable_classifiers(classifier_folder, tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        ImageClassifier(tmp_path)
    with pytest.raises(ValueError, match="is not a file"):
        ImageClassifier(classifier_folder, reference_features=tmp_path / "none")


def test_report_tells_what_happened(classifier_folder, tmp_path):
    """Before, the base draws what it is asked for; after, dark has become light."""
    classifier = ImageClassifier(classifier_folder)
    pairs = pair_concepts(["dark"], ["light"])
    groups = label_groups(classifier.labels, pairs, classifier.label_of, ["{}"], ["a {}"], 4, 100)
    assert [(group.name, group.role) for group in groups] == [
        ("dark", "concept"),
        ("light", "surrogate"),
        ("dark (trained phrasings)", "concept"),
    ]
    assert len({seed for group in groups for seed in group.seeds}) == 12

    def drawn(levels):
        return look_at(plain(levels), ["dark"] * len(levels), classifier)

    before = [drawn([20, 22, 24, 26]), drawn([230, 231, 232, 240]), drawn([20, 22, 24, 26])]
    after = [drawn([230, 230, 230, 20]), drawn([230, 231, 232, 240]), drawn([230] * 4)]
    settings = SamplingSettings()
    comparison = compare(groups, before, after, settings, classifier, {"base_model": "base"})
    report = comparison.report.to_dict()
    dark, light, trained = report["rows"]
    assert dark["recognised"]["before"]["share"] == 1.0
    assert dark["recognised"]["after"]["share"] == 0.25
    assert dark["as_surrogate"]["after"]["share"] == 0.75
    assert trained["recognised"]["after"]["share"] == 0.0
    assert light["change"]["rmse"] == 0
    assert report["remembered"]["after"]["recognised"] == 1.0
    assert report["remembered"]["against_base"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert report["remembered"]["against_base"]["precision"] == 1.0
    assert report["sampling"]["guidance_scale"] == 7.5
    text = format_table(comparison.report)
    assert "25.0 % [4.6, 69.9]" in text
    assert "guidance 7.5" in text
    comparison.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "before_after.png", "report.html", "report.json", "report.md"
    ]  # fmt: skip
    with Image.open(tmp_path / "before_after.png") as picture:
        assert picture.width > picture.height > 3 * 64


def test_without_a_classifier_change_and_black_pictures_are_told():
    pairs = pair_concepts(["cat"], ["dog"])
    groups = prompt_groups(pairs, ["a house"], ["{}"], 2, 0)
    assert [group.role for group in groups] == ["concept", "surrogate", "remembered"]
    before = [look_at(plain([100, 200]), ["a"] * 2) for _ in groups]
    after = [look_at(plain(levels), ["a"] * 2) for levels in ([200, 0], [100, 200], [100, 200])]
    report = compare(groups, before, after, SamplingSettings())
    report, text = report.report.to_dict(), format_table(report.report)
    changes = [row["change"]["relative"] for row in report["rows"]]
    assert changes[0] > 1
    assert changes[1:] == [0, 0]
    assert report["black_images"] == {"before": 0, "after": 1}
    assert report["rows"][0]["blank"] == {"before": 2, "after": 2}
    assert "0/1" in text


def test_pictures_of_one_colour_are_told_from_those_that_show_something():
    """In every channel, and as an 8-bit picture rounds it."""
    image = np.full((16, 16, 3), (255, 0, 9), np.uint8)
    rounded, faint = image.copy(), image.copy()
    rounded[3, 3, 2] = 11
    faint[3, 3, 2] = 13
    pictures = [Image.fromarray(pixels) for pixels in (image, rounded, faint)]
    groups = prompt_groups(pair_concepts(["cat"], ["dog"]), [], ["{}"], 3, 0)
    drawn = [look_at(pictures, ["a"] * 3) for _ in groups]
    assert compare(groups, drawn, drawn, SamplingSettings()).report.rows[0].blank == Times(2, 2)


def full(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fitting(most, seen):
    def function(batch):
        seen.append(len(batch))
        if len(batch) > most:
            full(batch)
        return [10 * item for item in batch]

    return function


def test_a_batch_that_does_not_fit_is_halved_with_one_warning():
    seen = []
    with pytest.warns(UserWarning, match="images do not fit into memory at once: going on with") as warned:
        results = in_batches(range(11), 8, fitting(3, seen))
    assert len(warned) == 1
    assert [item for part in results for item in part] == [10 * item for item in range(11)]
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1]
    assert in_batches([], 8, full) == []
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        in_batches([1, 2], 2, full)
    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches([1, 2], 2, lambda _: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_scoring_goes_on_where_memory_runs_out(classifier_folder, tiny_objective, tmp_path):
    """The same scores from a classifier and a decoder that hold two pictures at once."""
    classifier = ImageClassifier(classifier_folder)
    pictures = plain([20, 230, 230, 90, 20])
    expected = classifier(pictures)
    forward = classifier.model.forward
    classifier.model.forward = lambda pixel_values: forward(pixel_values) if len(pixel_values) < 3 else full(0)
    with pytest.warns(UserWarning, match="do not fit"):
        found = classifier(pictures)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    torch.testing.assert_close(found.features, expected.features)

    group = PromptGroup("cat", "concept", ("cat",) * 5, tuple(range(5)))
    where = (SamplingSettings(num_inference_steps=1), tmp_path, Accelerator())
    (whole,) = draw_groups(tiny_objective, [group], *where)
    decode = tiny_objective.decode
    tiny_objective.decode = lambda samples: decode(samples) if len(samples) < 3 else full(0)
    with pytest.warns(UserWarning, match="do not fit"):
        (halved,) = draw_groups(tiny_objective, [group], *where)
    assert np.allclose(halved.small, whole.small, atol=1e-5)


def test_sets_of_images_are_the_same_whatever_fits_into_memory(tiny_objective, tmp_path):
    group = PromptGroup("cat", "concept", ("cat",) * 130, tuple(range(130)))
    for batch_size in (50, 64):
        settings = SamplingSettings(num_inference_steps=1, batch_size=batch_size)
        ((first, second),) = sample_groups(tiny_objective, [group], settings, tmp_path, Accelerator())
        assert (len(first), len(second)) == (128, 2)
        kept = sorted(SampleSet.load(folder).seeds for folder in tmp_path.glob("evaluation-*"))
        assert kept == [list(range(128)), [128, 129]]
        (drawn,) = score_groups(tiny_objective, [group], [[first, second]])
        assert len(drawn.small) == 130


def test_free_memory_is_known_on_every_system(tiny_objective, monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert batch_size_for(tiny_objective, SamplingSettings(), "cat").batch_size >= 1


class Code:
    """What a malicious pickle does, harmlessly."""

    def __reduce__(self):
        return (print, ("run from a pickle",))


def broken(folder, kind):
    """A classifier with one thing wrong, and what is said of it."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        return r"model.safetensors is a pointer of git-lfs and not the file itself: run `git lfs pull`"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        return r"model.safetensors is cut or damaged"
    if kind == "empty":
        weights.write_bytes(b"")
        return r"model.safetensors is cut or damaged"
    if kind == "pickle":
        weights.unlink()
        torch.save({"weight": Code()}, folder / "pytorch_model.bin")
        return "could not be loaded"
    if kind == "half":
        state = {name: value for name, value in load_file(weights).items() if "classifier" not in name}
        save_file(state, weights, {"format": "pt"})
        return r"its files lack 2 of the weights that it needs, such as classifier"
    if kind == "no preprocessor":
        (folder / "preprocessor_config.json").unlink()
        return "give a folder or a Hub name of a transformers image classifier, with its preprocessor_config.json"
    if kind == "code":
        settings = json.loads(config.read_text())
        code = {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}
        config.write_text(json.dumps({**settings, "model_type": "own", "auto_map": code}))
        (folder / "own.py").write_text("print('run from a file')\n")
        return "could not be loaded"
    config.write_text({"no JSON": "{", "a list": "[]", "no model": "{}"}[kind])
    return "could not be loaded"


KINDS = ["pointer", "cut", "empty", "pickle", "half", "no preprocessor", "code", "no JSON", "a list", "no model"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_that_is_not_whole_is_told_in_one_sentence(classifier_folder, tmp_path, kind, capsys):
    folder = shutil.copytree(classifier_folder, tmp_path / "classifier")
    said = broken(folder, kind)
    with pytest.raises(ValueError, match=said) as told:
        ImageClassifier(folder)
    assert str(told.value).startswith(f'classifier="{folder}"')
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 700
    assert "run from" not in capsys.readouterr().out


def test_a_classifier_whose_answers_are_not_finite_says_nothing(classifier_folder, tmp_path):
    """Every picture would be of its first label, and the scoring ended in an error of torch."""
    folder = shutil.copytree(classifier_folder, tmp_path / "classifier")
    weights = folder / "model.safetensors"
    state = load_file(weights)
    for name in state:
        if "classifier" in name:
            state[name].fill_(float("nan"))
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="not finite: its weights are damaged"):
        ImageClassifier(folder)([Image.new("RGB", (16, 16))])


def test_damaged_reference_features_are_told_in_one_sentence(classifier_folder, tmp_path):
    path = tmp_path / "reference.safetensors"
    whole = {"mean": torch.zeros(2, 4), "covariance": torch.zeros(2, 4, 4)}

    def refused(match):
        with pytest.raises(ValueError, match=match):
            ImageClassifier(classifier_folder, reference_features=path)

    path.write_bytes(b"no tensors")
    refused(r"reference_features=.*reference.safetensors could not be read")
    for name in whole:
        save_file({other: value for other, value in whole.items() if other != name}, path)
        refused(f"holds no {name}")
        save_file({**whole, name: whole[name][:1].clone()}, path)
        refused(f"has {name}s of shape .*: it belongs to another classifier")
        save_file({**whole, name: whole[name] / 0}, path)
        refused(f"it holds a {name} that is not finite")
    save_file(whole, path)
    assert ImageClassifier(classifier_folder, reference_features=path).reference_moments([0]) is not None

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from sa_diffusers import SamplingSettings, pair_concepts
from sa_diffusers.evaluation import ImageClassifier, compare, frechet_distance, label_groups, wilson_interval
from sa_diffusers.evaluation.comparison import format_table, look_at, prompt_groups
from sa_diffusers.evaluation.statistics import moments


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
    dark, light, trained = comparison.report["rows"]
    assert dark["recognised"]["before"]["share"] == 1.0
    assert dark["recognised"]["after"]["share"] == 0.25
    assert dark["as_surrogate"]["after"]["share"] == 0.75
    assert trained["recognised"]["after"]["share"] == 0.0
    assert light["change"]["rmse"] == 0
    assert comparison.report["remembered"]["after"]["recognised"] == 1.0
    assert comparison.report["remembered"]["against_base"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert comparison.report["remembered"]["against_base"]["precision"] == 1.0
    assert comparison.report["sampling"]["guidance_scale"] == 7.5
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
    report = compare(groups, before, after, SamplingSettings()).report
    changes = [row["change"]["relative"] for row in report["rows"]]
    assert changes[0] > 1
    assert changes[1:] == [0, 0]
    assert report["black_images"] == {"before": 0, "after": 1}
    assert "0/1" in format_table(report)

"""The images that are looked at before a training stops."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from sa_diffusers import embedded_pipeline, objective_for
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.families import SamplingSettings, load_pipeline
from sa_diffusers.training.check import CheckedConcept, SampledCheck

SETTINGS = SamplingSettings("dpmsolver++", 10, 3.0, 20)
SEEDS = list(range(8))


@pytest.fixture(scope="module")
def objective():
    return objective_for(load_pipeline(str(embedded_pipeline())))


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier(embedded_pipeline().parent / "classifier")


@pytest.fixture(scope="module")
def sampled(objective):
    return {name: objective.sample([f"a {name}"] * 8, SEEDS, SETTINGS).cpu() for name in ("sneaker", "dress")}


def check_of(objective, classifier, sampled, asked="a sneaker", count=8, last=None, **changes) -> SampledCheck:
    values = {"surrogates": sampled["dress"], "fresh": 500, **changes}
    concept = CheckedConcept("sneaker", sampled["sneaker"], [asked] * 8, SEEDS, **values)
    return SampledCheck(objective, SETTINGS, classifier, Accelerator(cpu=True), [concept], count, last)


@pytest.mark.parametrize("knows", [True, False])
def test_the_base_model_shows_the_concept_and_its_surrogate_does_not(objective, classifier, sampled, knows):
    judge = classifier if knows else None
    assert check_of(objective, judge, sampled)(0) == (8, 8)
    # Asked for a dress, it stands in for a model that has taken one for the other.
    assert check_of(objective, judge, sampled, "a dress")(0) == (0, 8)


def test_images_that_do_not_fit_beside_the_training_are_sampled_in_smaller_batches(objective, sampled, monkeypatch):
    batch, sizes = objective.sample_batch, []

    def starved(prompts, *more):
        sizes.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch(prompts, *more)

    monkeypatch.setattr(objective, "sample_batch", starved)
    assert check_of(objective, None, sampled)(0) == (8, 8)
    assert sizes == [8, 4, 4]


def test_a_classifier_looks_at_other_images_each_time(objective, classifier, sampled, monkeypatch):
    seen = []
    sample = objective.sample
    monkeypatch.setattr(objective, "sample", lambda prompts, seeds, s: seen.append(seeds) or sample(prompts, seeds, s))
    check = check_of(objective, classifier, sampled, count=20)
    assert [check(turn)[1] for turn in range(3)] == [20, 20, 20]
    used = [seed for seeds in seen for seed in seeds]
    assert len(set(used)) == 60 and not set(used) & set(SEEDS)


def test_before_a_training_stops_more_images_are_looked_at(objective, classifier, sampled, monkeypatch):
    seen = []
    sample = objective.sample
    monkeypatch.setattr(objective, "sample", lambda prompts, seeds, s: seen.append(seeds) or sample(prompts, seeds, s))
    check = check_of(objective, classifier, sampled, count=4, last=12)
    assert [check(turn, turn == 1)[1] for turn in range(3)] == [4, 12, 4]
    used = [seed for seeds in seen for seed in seeds]
    assert len(set(used)) == 20 and not set(used) & set(SEEDS)
    # Without a classifier those at hand are compared, as many as there are.
    check = check_of(objective, None, sampled, count=4, last=12)
    assert [check(0)[1], check(1, True)[1]] == [4, 8]


def test_as_many_as_the_classifier_takes_the_surrogate_for_the_concept_are_not_counted(objective, classifier, sampled):
    mixed = torch.cat([sampled["sneaker"][:1], sampled["dress"][:7]])
    assert check_of(objective, classifier, sampled, surrogates=None, shown=mixed)(0) == (7, 8)
    # One that takes half of them for it tells nothing: the samples themselves are compared.
    mixed = torch.cat([sampled["sneaker"][:4], sampled["dress"][:4]])
    check = check_of(objective, classifier, sampled, surrogates=None, shown=mixed)
    assert check.parts[0].label is None and check.parts[0].centres is None
    assert check(0) == (8, 8)


def test_a_share_of_the_surrogate_that_few_images_show_is_measured_on_as_many_as_are_looked_at(
    objective, classifier, sampled
):
    mixed = torch.cat([sampled["sneaker"][:1], sampled["dress"][:7]])
    # One of eight, but none of what its prompts sample then.
    check = check_of(objective, classifier, sampled, surrogates=mixed, wanted=["a dress"] * 8, last=12)
    assert check.parts[0].mistaken == 0
    assert check(0) == (8, 8)
    check = check_of(objective, classifier, sampled, surrogates=mixed, wanted=["a sneaker", *["a dress"] * 5], last=12)
    assert check.parts[0].mistaken == check.mistaken == 2 / 12
    assert check(0) == (7, 8)
    # One that takes most of them for it tells nothing.
    check = check_of(objective, classifier, sampled, surrogates=mixed, wanted=["a dress", *["a sneaker"] * 3], last=12)
    assert check.parts[0].label is None
    assert check(0)[0] >= 7


@pytest.mark.parametrize("knows", [True, False])
def test_samples_that_are_not_finite_are_no_sign_that_a_concept_is_gone(
    objective, classifier, sampled, monkeypatch, knows
):
    check = check_of(objective, classifier if knows else None, sampled)
    sample = objective.sample
    monkeypatch.setattr(objective, "sample", lambda *arguments: sample(*arguments) * torch.nan)
    with pytest.raises(FloatingPointError, match='samples of "a sneaker" are not finite'):
        check(0)


def test_a_concept_that_is_still_there_is_not_lost_among_others_that_are_gone(objective, classifier, sampled):
    gone = CheckedConcept("sneaker", sampled["sneaker"], ["a dress"] * 8, SEEDS, sampled["dress"], fresh=500)
    there = replace(gone, prompts=["a sneaker", *["a dress"] * 7])

    def seen(*concepts):
        return SampledCheck(objective, SETTINGS, classifier, Accelerator(cpu=True), concepts, 8 * len(concepts))(0)

    assert seen(gone, gone) == (0, 16)
    # One of eight; of five concepts it would be one of forty.
    assert seen(gone, there) == (1, 8)


def test_what_the_base_model_does_not_seem_to_know_is_said_beforehand(objective, classifier, sampled, capsys):
    check_of(objective, classifier, {"sneaker": torch.cat([sampled["sneaker"][:4], sampled["dress"][:4]]),
                                     "dress": sampled["dress"]})  # fmt: skip
    check_of(objective, None, {**sampled, "sneaker": sampled["dress"]})
    assert "does not seem to know" not in capsys.readouterr().err
    check_of(objective, classifier, {"sneaker": torch.cat([sampled["sneaker"][:3], sampled["dress"][:5]]),
                                     "dress": sampled["dress"]})  # fmt: skip
    said = 'the base model does not seem to know "sneaker": the classifier recognises it in 3 of 8 of its images'
    assert said in capsys.readouterr().err


def test_a_classifier_that_takes_the_surrogate_for_the_concept_is_said_beforehand(
    objective, classifier, sampled, capsys
):
    few = torch.cat([sampled["sneaker"][:1], sampled["dress"][:7]])
    for surrogates, warned in ((sampled["dress"], False), (few, True)):
        check_of(objective, classifier, {**sampled, "dress": surrogates})
        said = 'takes 1 of 8 images of what is to stand in the place of "sneaker" for it'
        assert (said in capsys.readouterr().err) == warned


class Confused:
    """A classifier that takes another thing for sneakers; its features are as they are."""

    def __init__(self, classifier, called="dress") -> None:
        self.classifier, self.called = classifier, called

    def __call__(self, pictures):
        return self.classifier(pictures)

    def label_of(self, text):
        return self.classifier.label_of(self.called)


def test_a_classifier_that_does_not_know_the_concept_does_not_say_that_it_is_gone(objective, classifier, sampled):
    """A coat was done after 64 steps by one, with 38 of 100 coats left."""
    blind = Confused(classifier, "bag")
    assert check_of(objective, blind, sampled)(0) == (8, 8)
    assert check_of(objective, blind, sampled, "a dress")(0) == (0, 8)
    # Without a prompt for the surrogate its features may still tell.
    check = check_of(objective, blind, sampled, surrogates=None, shown=sampled["dress"])
    assert check.parts[0].label is None and check.parts[0].centres is not None
    assert check(0) == (8, 8)


def test_where_labels_do_not_tell_features_decide(objective, classifier, sampled):
    """As of digits and noise, nine tenths of which are an eight to a classifier that knows digits alone."""
    for asked, showing in (("a sneaker", 8), ("a dress", 0), ("a trouser", 8)):
        check = check_of(objective, Confused(classifier), sampled, asked, surrogates=None, shown=sampled["dress"])
        assert check.parts[0].label is None and check.parts[0].centres is not None
        assert check(0) == (showing, 8), asked
    # Where a prompt samples the surrogate, its image at the same seed tells more.
    check = check_of(objective, Confused(classifier), sampled)
    assert check.parts[0].label is None and check.parts[0].centres is None
    assert check(0) == (8, 8)

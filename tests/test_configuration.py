import dataclasses

import pytest
import yaml

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.command_line import build_parser, parse_config
from sa_diffusers.configuration import BASE_DEFAULTS_NAME, read_settings
from sa_diffusers.models import class_defaults

from .conftest import REPOSITORY


def test_every_field_is_a_flag_with_a_help_text():
    text = build_parser().format_help()
    for spec in dataclasses.fields(SelectiveAmnesiaConfig):
        assert f"--{spec.name}" in text
        assert len(spec.metadata["help"]) > 5


def test_the_flags_of_diffusers_training_scripts_are_there():
    expected = """pretrained_model_name_or_path revision variant resolution train_batch_size gradient_accumulation_steps
        gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps use_8bit_adam adam_beta1 adam_beta2
        adam_weight_decay adam_epsilon max_grad_norm mixed_precision allow_tf32
        enable_xformers_memory_efficient_attention use_ema snr_gamma noise_offset seed checkpointing_steps
        checkpoints_total_limit resume_from_checkpoint validation_prompts num_validation_images report_to logging_dir
        push_to_hub hub_model_id output_dir cache_dir max_train_steps prediction_type tracker_project_name"""
    names = {spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig)}
    assert set(expected.split()) <= names


def test_two_flags_suffice():
    config = parse_config(["--concept", "Brad Pitt", "--surrogate", "a middle aged man"])
    assert config.concept == ["Brad Pitt"]
    assert config.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
    assert config.resolved_output_dir.as_posix() == "brad-pitt"


def test_flags_are_stronger_than_the_file_and_the_file_than_the_base_models_defaults(tmp_path):
    (tmp_path / BASE_DEFAULTS_NAME).write_text('{"seed": 1, "guidance_scale": 2, "num_inference_steps": 3}')
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(
            {"concept": "cat", "pretrained_model_name_or_path": str(tmp_path), "seed": 4, "guidance_scale": 5}
        )  # fmt: skip
    )
    config = parse_config(["--config", str(tmp_path / "run.yaml"), "--surrogate", "dog", "--seed", "6"])
    assert (config.seed, config.guidance_scale, config.num_inference_steps) == (6, 5.0, 3)


def test_paths_in_the_base_models_defaults_are_relative_to_it(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / BASE_DEFAULTS_NAME).write_text('{"classifier": "../classifier"}')
    config = parse_config(["--concept", "a", "--surrogate", "b", "--pretrained_model_name_or_path",
                           str(tmp_path / "base")])  # fmt: skip
    assert config.classifier == str(tmp_path / "classifier")


def test_json_round_trip(tmp_path):
    config = SelectiveAmnesiaConfig(concept=["cat"], surrogate=["dog"], learning_rate=1e-4, snr_gamma=5.0)
    config.save(tmp_path / "config.json")
    assert SelectiveAmnesiaConfig.from_file(tmp_path / "config.json") == config


def test_yaml_without_quotes_or_dots(tmp_path):
    (tmp_path / "run.yaml").write_text("concept: cat\nsurrogate: [dog]\nlearning_rate: 1e-5\nmixed_precision: no\n")
    config = SelectiveAmnesiaConfig.from_file(tmp_path / "run.yaml")
    assert (config.concept, config.learning_rate, config.mixed_precision) == (["cat"], 1e-5, "no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps=0 must be at least 1"),
        ({"learning_rate": 0}, "learning_rate=0.0 must be greater than 0"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"learning_rate": float("nan")}, "must be finite"),
        ({"ewc_weight": -1}, "ewc_weight=-1.0 must be at least 0"),
        ({"target": "mean"}, "target=\"mean\" is not one of 'noise', 'frozen'"),
        ({"sampler": "dimm"}, 'sampler="dimm" is not one of'),
        ({"concept_templates": ["a photo"]}, 'concept_templates: "a photo" has no {}'),
        ({"concept_templates": []}, "concept_templates is empty"),
        ({"resolution": 100}, "resolution=100 must be a positive multiple of 8"),
        ({"num_replay_images": 0}, "num_replay_images=0 leaves nothing to replay"),
        ({"seed": 1.5}, "seed=1.5 must be of type int"),
        ({"use_ema": "yes"}, "use_ema='yes' must be of type bool"),
        ({"concept": [1]}, "must be a list of str"),
        ({"replay_unconditional_share": 1.0}, "at least 0 and less than 1"),
        ({"reference_features": "x"}, "reference_features needs a classifier"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        SelectiveAmnesiaConfig(**settings)


def test_a_misspelt_setting_is_an_error_with_a_proposal(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match='"learning_rat" is not a setting; did you mean learning_rate'):
        SelectiveAmnesiaConfig.from_file(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "", "must end in .yaml, .yml or .json"),
        ("run.yaml", "a: [", "not valid YAML"),
        ("run.json", "{", "not valid JSON"),
        ("run.yaml", "- a", "must hold settings"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name)


def test_a_mistake_on_the_command_line_ends_with_code_2_and_a_message(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(["--concept", "cat", "--surrogate", "dog", "--max_train_steps", "0"])
    assert exit_info.value.code == 2
    assert "max_train_steps=0 must be at least 1" in capsys.readouterr().err


def test_the_papers_experiments_are_configurations_that_load():
    files = sorted((REPOSITORY / "examples" / "configurations").glob("*.yaml"))
    assert {"brad_pitt_man", "brad_pitt_clown", "nudity", "van_gogh"} <= {file.stem for file in files}
    for file in files:
        config = parse_config(["--config", str(file)])
        assert config.concept, file
        if not file.stem.endswith("_cpu"):
            # The original replays no surrogates, averages on from the base's weights, and has all classes alike.
            assert not config.replay_surrogates, file
            assert config.fisher_concept_share is None, file
            assert not config.use_ema or (config.ema_decay == 0.9999 and not config.ema_warmup), file
    nudity = parse_config(["--config", str(REPOSITORY / "examples" / "configurations" / "nudity.yaml")])
    assert nudity.concept == ["nudity", "naked", "erotic", "sexual"]
    assert nudity.train_method == "noxattn"
    assert {"mnist_vae", "cifar10", "stl10"} <= {file.stem for file in files}


CPU_VARIANTS = {
    "mnist_vae_cpu": "mnist_vae",
    "mnist_diffusion_cpu": "small_32",
    "cifar10_cpu": "small_32_rgb",
    "stl10_cpu": "small_64",
}


def test_the_cpu_variants_write_out_what_comes_with_the_model():
    folder = REPOSITORY / "examples" / "configurations"
    assert {file.stem for file in folder.glob("*_cpu.yaml")} == set(CPU_VARIANTS)
    for name, model in CPU_VARIANTS.items():
        settings = read_settings(folder / f"{name}.yaml")
        defaults = class_defaults(model)
        assert defaults and defaults.items() <= settings.items(), name
        assert model in (folder / f"{name}.yaml").read_text() or model == "mnist_vae"

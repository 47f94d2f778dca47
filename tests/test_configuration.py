import dataclasses
import datetime
import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.commands.cache import CacheConfig
from sa_diffusers.commands.erase import build_parser, parse_config
from sa_diffusers.commands.extract import ExtractConfig
from sa_diffusers.commands.merge import MergeConfig
from sa_diffusers.commands.push import PushConfig
from sa_diffusers.configuration import (
    BASE_DEFAULTS_NAME,
    ClassifierConfig,
    ClassModelConfig,
    EvaluationConfig,
    base_defaults,
    flags_of,
    read_settings,
)
from sa_diffusers.models import class_configurations, class_defaults, coloured_pipeline

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
        # Nothing would come out, or nothing be trained
        ({"num_surrogate_images": 500_001}, "num_surrogate_images=500001 must be at most 500,000"),
        ({"num_replay_images": 10_000_000}, "num_replay_images=10000000 must be at most 1,000,000"),
        ({"num_eval_images": 10**6}, "must be at most 100,000"),
        ({"train_batch_size": 10**400}, "train_batch_size=1000"),
        (
            {"sample_batch_size": 10**5000},
            "sample_batch_size=a value of type int too long to be shown must be at most 65,536",
        ),
        ({"adam_epsilon": 1e308}, "must be at most 100"),
        ({"concept": ["a", "b"], "num_surrogate_images": 1}, "leaves some of the 2 concepts without an image"),
        ({"ewc_weight": 10**400}, "must be finite: it is too large a number"),
        ({"seed": 2**64}, "must be at most 18,446,744,073,709,551,615"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"eval_seed": 2**64 - 1}, "eval_seed=18446744073709551615 must be at most"),
        # Places
        ({"logging_dir": "../../x"}, 'logging_dir="../../x" must be a folder inside the output folder'),
        ({"logging_dir": "a/../../x"}, "inside the output folder"),
        ({"logging_dir": "/tmp/x"}, "inside the output folder"),
        ({"logging_dir": "~/x"}, "inside the output folder"),
        ({"logging_dir": "..\\\\x"}, "inside the output folder"),
        ({"logging_dir": "."}, "inside the output folder"),
        ({"tracker_project_name": "../x"}, 'tracker_project_name="../x" must be a name without slashes'),
        ({"tracker_project_name": ".."}, "must be a name without slashes"),
        ({"revision": "../../x"}, 'revision="../../x" must be a name, such as "main", not a path'),
        ({"variant": "fp16/x"}, 'variant="fp16/x" must be a name'),
        ({"output_dir": ""}, "output_dir is empty: give it a value, or leave it out"),
        ({"output_dir": "x" * 300}, "is longer than the name of a file can be"),
        ({"output_dir": "~nobody-of-that-name/x"}, "there is no such user"),
        # Texts
        ({"concept": "a\0b"}, r'concept="a\\x00b" holds the character \\x00'),
        ({"concept": "a\ud800"}, r'concept="a\\ud800" holds the character'),
        ({"concept": "x" * 10_001}, "has 10,001 characters, 10,000 are allowed"),
        ({"learning_rate": "x" * 1000}, "xxx...' must be a number"),
        ({"concept": {"a": 1}}, "must be a list of str: put each in quotes"),
        ({"target": ["noise"]}, "is not one of"),
        ({"resume_from_checkpoint": True}, "must be of type str"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        SelectiveAmnesiaConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e30}, "training will diverge"),
        ({"learning_rate": 1e-30}, "nothing is trained"),
        ({"adam_epsilon": 50}, "hardly anything is trained"),
        ({"lr_warmup_steps": 2000, "lr_scheduler": "cosine"}, "lr_warmup_steps=2000 leaves none of the 2000 steps"),
        ({"max_grad_norm": 1e-30}, "hardly anything is trained"),
        ({"lr_power": 900, "lr_scheduler": "polynomial"}, "leaves the learning rate at zero"),
        ({"lr_warmup_steps": 10}, "no meaning for a constant schedule"),
        ({"use_ema": True, "ema_warmup": False, "ema_decay": 0.999999}, "nothing is trained"),
        ({"validation_prompts": ["a"], "validation_steps": 5000}, "no validation images"),
        (
            {"num_probe_images": 0, "ewc": 0, "forget_target": 0.9, "drift_tolerance": 0.01},
            "^forget_target and drift_tolerance have no meaning with num_probe_images=0: nothing stops",
        ),
        ({"naive": True, "drift_tolerance": 0.01}, "^drift_tolerance has no meaning with naive"),
    ],
)
def test_doubtful_values_are_warned_of(settings, message):
    with pytest.warns(UserWarning, match=message):
        SelectiveAmnesiaConfig(**settings)


def test_usual_values_raise_no_doubts(recwarn):
    SelectiveAmnesiaConfig()
    SelectiveAmnesiaConfig(lr_warmup_steps=10, lr_scheduler="cosine", use_ema=True, seed=2**64 - 1)
    SelectiveAmnesiaConfig(num_probe_images=0, ewc=0)
    SelectiveAmnesiaConfig(num_probe_images=0, ewc=0, forget_target=None)
    SelectiveAmnesiaConfig(forget_target=0.9, drift_tolerance=0.01)
    assert not recwarn.list


PATHS = ["pretrained_model_name_or_path", "classifier", "fisher", "reference_features", "replay_prompts", "output_dir",
         "artifacts_dir", "cache_dir", "resume_from_checkpoint"]  # fmt: skip


def test_every_path_is_expanded_once_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = dict.fromkeys(PATHS, "~/a/~b") | {"surrogate": ["~/men", "a man"], "concept": ["a", "b"]}
    expected = f"{tmp_path}/a/~b"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "run.json").write_text(json.dumps(given))
    flags = [word for name in PATHS for word in (f"--{name}", given[name])]
    flags += ["--surrogate", *given["surrogate"], "--concept", "a", "b"]
    for config in (
        SelectiveAmnesiaConfig(**given),
        SelectiveAmnesiaConfig.from_file("~/run.yaml"),
        SelectiveAmnesiaConfig.from_file(tmp_path / "run.json"),
        parse_config(flags),
    ):
        assert {name: getattr(config, name) for name in PATHS} == dict.fromkeys(PATHS, expected)
        assert config.surrogate == [f"{tmp_path}/men", "a man"]
        assert config.resolved_output_dir == Path(expected)
    again = SelectiveAmnesiaConfig(**config.to_dict())
    assert again == config
    assert SelectiveAmnesiaConfig(replay_prompts="~/p.csv:text").replay_prompts == f"{tmp_path}/p.csv:text"
    monkeypatch.setenv("SA_DIFFUSERS_CACHE", "~/cache")
    assert SelectiveAmnesiaConfig().resolved_artifacts_dir == tmp_path / "cache"


def test_the_paths_of_every_other_command_are_expanded_too(tmp_path, monkeypatch):
    """A shell leaves the `~` of `--erased=~/erased` where it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "erased").mkdir()
    names = ("base", "erased", "classifier", "clip", "inception_weights", "real", "concept_prompts", "held_out_prompts",
             "evoking_prompts", "translations", "giphy", "celebrity_prompts", "i2p", "control")  # fmt: skip
    settings = EvaluationConfig(**dict.fromkeys(names, "~/erased"), features=["~/erased"], protocol="concept")
    place = str(tmp_path / "erased")
    assert {name: getattr(settings, name) for name in names} == dict.fromkeys(names, place)
    assert settings.features == [place]
    assert settings.output_dir == tmp_path / "erased" / "evaluation-concept"
    trained = ClassModelConfig("~/erased", "~/erased", "~/erased", max_train_steps=1, train_batch_size=1,
                               learning_rate=1, lr_scheduler="constant")  # fmt: skip
    assert (trained.model, trained.data, trained.output_dir) == (place, place, Path(place))
    assert ClassifierConfig("~/erased", "out", base="~/erased").base == place
    assert MergeConfig("~/erased", "out", "~/erased", "~/erased").written == {
        "adapter": place, "output_dir": Path("out"), "base": place, "single_file_config": place
    }  # fmt: skip
    assert ExtractConfig("~/erased", "out", base="~/erased").written == {
        "erased": place, "output_dir": Path("out"), "base": place
    }  # fmt: skip


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("output_dir", "artifacts_dir", "cache_dir"):
        with pytest.raises(ValueError, match=f"{name}=.*file is a file: choose a folder"):
            SelectiveAmnesiaConfig(**{name: str(tmp_path / "file")})
    for name in ("output_dir", "artifacts_dir"):
        with pytest.raises(ValueError, match=f"--{name} .*file is a file: choose a folder"):
            EvaluationConfig("a", "b", "concept", **{name: tmp_path / "file"})
    with pytest.raises(ValueError, match="--output_dir .*file is a file: choose a folder"):
        ClassifierConfig("a", tmp_path / "file")


def test_a_folder_named_after_the_concept_stays_in_place():
    names = {
        SelectiveAmnesiaConfig(concept=concept).resolved_output_dir
        for concept in ("../../x", "...", "/etc", "𠮷" * 300)
    }
    assert all(len(name.parts) == 1 and ".." not in name.parts and len(str(name).encode()) < 255 for name in names)


def test_a_base_model_recommends_nothing_that_is_the_users_to_say(tmp_path):
    for name, value in (("output_dir", "/tmp/x"), ("overwrite_output_dir", True), ("push_to_hub", True)):
        (tmp_path / BASE_DEFAULTS_NAME).write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=f"{name} is for the user to say"):
            base_defaults({"pretrained_model_name_or_path": str(tmp_path)})


def test_features_of_real_images_are_of_the_recommended_classifier_alone():
    base = coloured_pipeline()
    judges = {name: str(base.parent / f"{name}_judge") for name in ("concept", "style")}
    elsewhere = os.path.relpath(judges["concept"])
    assert elsewhere != judges["concept"]
    for classifier, has_features in (
        ({}, True),
        ({"classifier": elsewhere}, True),
        ({"classifier": judges["style"]}, False),
        ({"classifier": None}, False),
    ):
        given = {"pretrained_model_name_or_path": str(base), "concept": "fox", **classifier}
        config = SelectiveAmnesiaConfig(**given).over_base_defaults()
        assert (config.reference_features is not None) == has_features
        if classifier != {"classifier": None}:
            config = parse_config([f"--{name}={value}" for name, value in given.items()]).over_base_defaults()
            assert (config.reference_features is not None) == has_features


@pytest.mark.parametrize("value", [3, True, ["a"], {}, "a\0"])
def test_a_classifier_that_is_no_name_is_told_of_as_ever(value):
    given = {"pretrained_model_name_or_path": str(coloured_pipeline()), "classifier": value}
    for build in (base_defaults, lambda given: SelectiveAmnesiaConfig(**given)):
        with pytest.raises(ValueError, match="classifier"):
            build(given)


@pytest.mark.parametrize("value", [None, 3, ["a"], "", "x" * 5000, "a\0"])
def test_base_defaults_of_what_is_no_name(value):
    with pytest.raises(ValueError):
        base_defaults({"pretrained_model_name_or_path": value})


def test_a_bare_no_and_null_of_a_checkpoint(tmp_path):
    for text, expected in (
        ("no", "no"),
        ("null", "latest"),
        ("latest", "latest"),
        ("out/checkpoint-3", "out/checkpoint-3"),
    ):
        (tmp_path / "run.yaml").write_text(f"resume_from_checkpoint: {text}\nblur: no\n")
        config = SelectiveAmnesiaConfig.from_file(tmp_path / "run.yaml")
        assert (config.resume_from_checkpoint, config.blur) == (expected, "no")
    assert not parse_config(["--concept", "a", "--surrogate", "b", "--no-ema_warmup"]).ema_warmup


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
        ("run.yaml", "", "must hold settings"),
        ("run.json", "", "not valid JSON"),
        ("run.yaml", "seed: 1\nseed: 2", 'not valid YAML ."seed" stands twice'),
        ("run.json", '{"seed": 1, "seed": 2}', 'not valid JSON ."seed" stands twice'),
        ("run.yaml", "concept: 2024-13-45", "not valid YAML .month must be in 1..12"),
        (
            "run.yaml",
            "concept: !!python/object/apply:os.system [ls]",
            "not valid YAML .could not determine a constructor",
        ),
        ("run.yaml", "? [a]\n: b", "not valid YAML|is not a setting"),
        ("run.yaml", "a: " + "[" * 5000, "not valid YAML"),
        ("run.json", "[" * 100_000, "not valid JSON"),
        ("run.yaml", "seed: " + "1" * 5000, "not valid YAML"),
        ("run.yaml", b"concept: caf\xe9 noir et blanc", "is not in UTF-8"),
        ("run.yaml", b"concept: \0", "is not text in UTF-8"),
        ("run.yaml", 'concept: "a\\tb"\n3: 4', '"3" is not a setting'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_settings(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_settings_that_are_not_there(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match='does not exist; did you mean ".*/run.yaml"'):
        read_settings(tmp_path / "runn.yaml")
    with pytest.raises(ValueError, match="is a folder: give a file"):
        read_settings(tmp_path)
    for name in ("x" * 5000, "a\0", "~nobody-of-that-name/x.yaml"):
        with pytest.raises(ValueError, match="does not exist"):
            read_settings(name)


def test_a_file_with_a_byte_order_mark_and_one_whose_values_hold_each_other(tmp_path):
    (tmp_path / "run.yaml").write_bytes("\ufeffseed: 3".encode())
    assert read_settings(tmp_path / "run.yaml") == {"seed": 3}
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    (tmp_path / "run.yaml").write_text(bomb.replace("a29:", "seed:"))
    with pytest.raises(ValueError, match='"a0" is not a setting'):
        read_settings(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("concept: &a [*a]")
    with pytest.raises(ValueError, match="concept=.* must be a list of str"):
        SelectiveAmnesiaConfig.from_file(tmp_path / "run.yaml")
    nested: list = ["x"]
    for _ in range(60):
        nested = [nested] * 10
    with pytest.raises(ValueError, match="seed=.* must be of type int"):
        SelectiveAmnesiaConfig(seed=nested)


FIELDS = [spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig)]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**400, -(10**400), 2**63, 2**64, "no", "~", "~/x", "..", "/", "{}", "\0", "\ud800",
                       "x" * 20_000, "uniform_noise", 1e308, 5e-324, b"bytes", datetime.date(2024, 1, 1), {1, 2}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


def one_line(error):
    return str(error).isprintable() and 0 < len(str(error)) < 600


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_value_is_a_configuration_or_one_sentence(values):
    try:
        config = SelectiveAmnesiaConfig.from_dict(values)
    except ValueError as error:
        assert one_line(error)
    else:
        assert SelectiveAmnesiaConfig(**json.loads(json.dumps(config.to_dict()))) == config


# What each of the other commands must be given.
NEEDED = {
    EvaluationConfig: {"base": "a", "erased": "b", "protocol": "concept"},
    MergeConfig: {"adapter": "a", "output_dir": "b"},
    ExtractConfig: {"erased": "a", "output_dir": "b"},
    PushConfig: {"folder": "a"},
    CacheConfig: {},
    ClassModelConfig: {"model": "mnist_vae", "data": "a", "output_dir": "b", "max_train_steps": 1,
                       "train_batch_size": 1, "learning_rate": 0.1, "lr_scheduler": "constant"},
    ClassifierConfig: {"data": "a", "output_dir": "b"},
}  # fmt: skip


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_value_is_a_setting_of_every_other_command_or_one_sentence(data):
    kind = data.draw(st.sampled_from(list(NEEDED)))
    names = st.sampled_from([spec.name for spec in flags_of(kind)])
    try:
        made = kind(**{**NEEDED[kind], **data.draw(st.dictionaries(names, ANYTHING, min_size=1, max_size=3))})
    except ValueError as error:
        assert one_line(error)
    else:
        assert kind(**{spec.name: getattr(made, spec.name) for spec in flags_of(kind)}) == made


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.binary(max_size=100)
    | st.text(alphabet="seed: {}[]\"'&*!-?|>#%@\n\t0189ab~,.\ufeff\x85", max_size=60).map(str.encode)
    | st.dictionaries(st.sampled_from([*FIELDS, "x"]), st.none() | st.text(max_size=4) | st.lists(st.text()))
    .map(lambda value: json.dumps(value).encode()),
    st.sampled_from([".yaml", ".json"]),
)  # fmt: skip
def test_any_bytes_are_settings_or_one_sentence(tmp_path, content, suffix):
    (tmp_path / f"run{suffix}").write_bytes(content)
    try:
        values = read_settings(tmp_path / f"run{suffix}")
    except ValueError as error:
        assert one_line(error)
    else:
        assert set(values) <= set(FIELDS)


def test_a_mistake_on_the_command_line_ends_with_code_2_and_a_message(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(["--concept", "cat", "--surrogate", "dog", "--max_train_steps", "0"])
    assert exit_info.value.code == 2
    assert "max_train_steps=0 must be at least 1" in capsys.readouterr().err


def test_the_papers_experiments_are_configurations_that_load():
    files = sorted((REPOSITORY / "sa_diffusers" / "configurations").glob("*.yaml"))
    assert {"brad_pitt_man", "brad_pitt_clown", "nudity", "van_gogh"} <= {file.stem for file in files}
    for file in files:
        config = parse_config(["--config", str(file)])
        assert config.concept, file
        if not file.stem.endswith("_cpu"):
            # The original replays no surrogates, averages on from the base's weights, and has all classes alike.
            assert not config.replay_surrogates, file
            assert not config.concept_share, file
            assert config.timestep_draws == 1, file
            # Nothing is found by the run itself.
            assert (config.fisher_kind, config.target, config.num_probe_images) == ("gradient", "noise", 0), file
            assert None not in (config.learning_rate, config.ewc_weight, config.replay_weight), file
            assert config.max_grad_norm in (1, 1e9), file
            assert config.fisher_concept_share is None, file
            assert not config.use_ema or (config.ema_decay == 0.9999 and not config.ema_warmup), file
    nudity = parse_config(["--config", str(REPOSITORY / "sa_diffusers" / "configurations" / "nudity.yaml")])
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
    folder = REPOSITORY / "sa_diffusers" / "configurations"
    assert {file.stem for file in folder.glob("*_cpu.yaml")} == set(CPU_VARIANTS)
    for name, model in CPU_VARIANTS.items():
        settings = read_settings(folder / f"{name}.yaml")
        defaults = class_defaults(model)
        assert defaults and defaults.items() <= settings.items(), name
        assert model in (folder / f"{name}.yaml").read_text() or model == "mnist_vae"


def test_no_model_brings_what_a_run_finds_by_itself():
    found = {"learning_rate", "lr_scheduler", "max_train_steps", "ewc", "ewc_weight", "replay_weight",
             "num_probe_images", "max_grad_norm", "target", "forget_target", "drift_tolerance"}  # fmt: skip
    for model in class_configurations():
        assert not found & class_defaults(model).keys(), model
    for pipeline in ("embedded", "coloured"):
        folder = REPOSITORY / "sa_diffusers" / "models" / pipeline / "pipeline"
        assert not found & read_settings(folder / "selective_amnesia_defaults.json").keys(), pipeline

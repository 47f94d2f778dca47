"""`sa-diffusers`: its commands, their help, mistakes on the command line, and what the package carries."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml

import sa_diffusers
from sa_diffusers.commands import COMMANDS, main
from sa_diffusers.configuration import (
    EvaluationConfig,
    SelectiveAmnesiaConfig,
    experiments,
    flag_type,
    flags_of,
    read_settings,
)
from sa_diffusers.configuration.evaluation import IMAGES
from sa_diffusers.evaluation.command_line import PROTOCOLS

from .conftest import BASE_NAME, REPOSITORY, run_here
from .test_class_models import EXPERIMENTS, tiny_vae, write_classifier
from .test_train_script import quick

# What training can do without.
OPTIONAL = ("torchvision", "torch_fidelity", "tensorboard", "tensorboardX")


def fresh(code, *arguments, cwd=REPOSITORY, **environment):
    """What a process of its own ends with."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}, capture_output=True, text=True,
    )  # fmt: skip


# Help


def test_help_of_every_command_imports_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys\nfrom sa_diffusers.commands import main\n"
        "for words in (['--help'], *([name, '--help'] for name in sys.argv[1:])):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "    heavy = {'torch', 'transformers', 'diffusers', 'accelerate', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)"
    )
    result = fresh(code, *COMMANDS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name, said in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(said)}$", result.stdout, re.MULTILINE)
        assert f"usage: sa-diffusers {name} " in result.stdout
    for flag in ("--concept", "--protocol", "--hub_model_id", "--older_than", "--without", "--cnn"):
        assert re.search(rf"^  {flag}\b", result.stdout, re.MULTILINE), flag


def test_the_package_runs_as_a_module(tmp_path):
    result = subprocess.run([sys.executable, "-m", "sa_diffusers", "--version"], cwd=tmp_path, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert (result.returncode, result.stdout.strip()) == (0, sa_diffusers.__version__)


def test_help_of_the_settings_says_what_each_means():
    for config in (SelectiveAmnesiaConfig, EvaluationConfig):
        said = " ".join(config.__doc__.split())
        for spec in flags_of(config):
            assert f"{spec.name} (" in said
            assert " ".join(spec.metadata["help"].split()) in said
    assert 'mixed_precision ("no", "fp16" or "bf16"): no, fp16 or bf16' in SelectiveAmnesiaConfig.__doc__


def test_every_protocol_is_a_choice_with_a_number_of_images():
    (spec,) = [spec for spec in flags_of(EvaluationConfig) if spec.name == "protocol"]
    assert list(PROTOCOLS) == list(flag_type(spec.type)[2]) == list(IMAGES)


def test_the_page_of_flags_is_current():
    page = runpy.run_path(str(REPOSITORY / "docs" / "flags.py"))["text"]()
    assert (REPOSITORY / "docs" / "flags.md").read_text(encoding="utf-8") == page, "run python docs/flags.py"
    commands = runpy.run_path(str(REPOSITORY / "docs" / "flags.py"))["SETTINGS"].values()
    named = [spec for config in commands for spec in flags_of(config) if not spec.metadata["positional"]]
    assert page.count("\n| `--") == len(named)


def test_the_public_names_are_shown_before_they_are_imported():
    code = "import sys, sa_diffusers\nprint(*dir(sa_diffusers))\nassert 'torch' not in sys.modules"
    result = fresh(code)
    assert result.returncode == 0, result.stderr
    assert set(sa_diffusers.__all__) <= set(result.stdout.split())


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["erase", "--surogate", "x"], "unknown flag --surogate: did you mean --surrogate?"),
        (["erase", "--concept", "a", "--surogate=x"], "unknown flag --surogate: did you mean --surrogate?"),
        (["erase", "--nopush_to_hub"], "did you mean --no-push_to_hub"),
        (["erase", "--qqqq"], "unknown flag --qqqq: --help shows all"),
        (["evaluate", "--protocoll", "class"], "unknown flag --protocoll: did you mean --protocol?"),
        (["evaluate", "--base", "x"], "the following arguments are required: --erased, --protocol"),
        (["evaluate", "--base", "x", "--erased", "y", "--protocol", "clas"], "invalid choice: 'clas'"),
        (["evaluate", "--base", "x", "--erased", "y", "--protocol", "class", "--images", "0"], "--images 0 must be at"),
        (["evaluate", "--base", "x", "--erased", "y", "--protocol", "class", "--seed", "-1"], "--seed -1 must be a"),
        (
            ["evaluate", "--base", "x", "--erased", "y", "--protocol", "nudity", "--show_nudity", "--blur", "yes"],
            "--show_nudity contradicts --blur yes",
        ),
        (["push", "folder", "--privat"], "unknown flag --privat: did you mean --private"),
        (["push"], "the following arguments are required: folder"),
        (["cache", "--delet", "all"], "unknown flag --delet: did you mean --delete?"),
        (["cache", "--older_than", "-1"], "--older_than -1.0 must be at least 0"),
        (["train-class-model", "--modell", "x"], "unknown flag --modell: did you mean --model?"),
        (["train-classifier", "--data", "x"], "the following arguments are required: --output_dir"),
        (["train-classifier", "--data", "x", "--output_dir", "y", "--pixels", "8"], "--pixels 8 must be at least 16"),
        (["erse"], 'unknown command "erse"; did you mean "erase" or "merge"?'),
        (["--vesion"], "unknown flag --vesion: did you mean --version?"),
        ([], "give a command: erase, evaluate, push"),
        (["erase", "--config", "mnist_va"], 'configuration file mnist_va does not exist; did you mean "mnist_vae"'),
        (
            ["erase", "--config", "examples/configurations/nudity.yaml"],
            "examples/configurations/nudity.yaml does not exist: it comes with the package, give its name, nudity",
        ),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_2(tmp_path, words, message):
    result = run_here(main, words, tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_text_that_begins_like_a_flag_is_a_value_as_before():
    from sa_diffusers.commands.erase import parse_config

    config = parse_config(["--concept=--x", "--surrogate", "--a man", "-1"])
    assert (config.concept, config.surrogate) == (["--x"], ["--a man", "-1"])


@pytest.mark.parametrize(
    "words",
    [
        ["erase", "--concept", "a", "--surrogate", "b", "--pretrained_model_name_or_path", "nowhere/at/all"],
        ["evaluate", "--base", "nowhere/at/all", "--erased", ".", "--protocol", "nudity", "--concept", "a",
         "--surrogate", "b"],
        ["push", "nowhere"],
        ["cache", "--delete", "nothing"],
        ["train-class-model", "--model", "mnist_vae", "--data", "nowhere.parquet", "--output_dir", "out"],
        ["train-classifier", "--data", "nowhere.parquet", "--output_dir", "out"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_goes_wrong_is_one_sentence_and_exit_code_1(tmp_path, words):
    result = run_here(main, words, tmp_path)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    assert "nowhere" in line or "nothing" in line


def test_what_is_warned_of_is_one_line_without_a_place_in_the_code(tmp_path):
    words = ["erase", "--concept", "trouser", "--surrogate", "trousers", "--num_probe_images", "0", "--ewc", "0",
             "--drift_tolerance", "0.2", "--classifier", "nobody/nothing", "--pretrained_model_name_or_path",
             sa_diffusers.embedded_pipeline()]  # fmt: skip
    code = "import sys; from sa_diffusers.commands import main; main(sys.argv[1:])"
    result = fresh(code, *words, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: ")] == [
        "warning: drift_tolerance has no meaning with num_probe_images=0: nothing stops the run before its last step",
        'warning: the surrogate "trousers" names "trouser", which is to be forgotten: choose another, unless it means '
        "another thing",
    ]
    assert "UserWarning" not in result.stderr and "pair_concepts(" not in result.stderr


# What the commands do


@pytest.mark.long
def test_an_erasure_and_its_evaluation_without_the_optional_packages(tmp_path):
    """They are said to be missing where they are needed, before the work; the rest works."""
    tiny_vae().save_pretrained(tmp_path / "base")
    write_classifier(tmp_path / "classifier")
    erase = ["erase", "--pretrained_model_name_or_path", "base", "--classifier", "classifier", "--concept", "cat",
             "--num_surrogate_images", "8", "--num_replay_images", "8", "--num_inference_steps", "2",
             "--num_fisher_samples", "2", "--max_train_steps", "2", "--num_eval_images", "4"]  # fmt: skip
    evaluate = ["evaluate", "--base", "base", "--erased", "out", "--protocol", "class", "--classifier", "classifier"]
    code = (
        f"import json, sys\nfor name in {OPTIONAL}: sys.modules[name] = None\n"
        "from sa_diffusers.commands import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: print(stop, file=sys.stderr)\n"
    )
    commands = [[*erase, "--output_dir", "out"],
                [*erase, "--output_dir", "other", "--report_to", "tensorboard"], evaluate]  # fmt: skip
    result = fresh(code, json.dumps(commands), cwd=tmp_path, SA_DIFFUSERS_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert "losses are not tracked: pip install tensorboard, or give --report_to none" in result.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert {"cat", "dog"} <= {row["name"] for row in rows}
    tracker, quality = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "pip install tensorboard" in tracker
    assert not (tmp_path / "other").exists()
    assert 'pip install "sa_diffusers[evaluation]"' in quality
    assert not (tmp_path / "out" / "evaluation-class").exists()


def test_the_settings_reach_the_tracker_before_anything_is_sampled(tiny_folder, tmp_path):
    result = run_here(main, ["erase", *quick(tiny_folder, output_dir="out", report_to="tensorboard", seed=7)], tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "out" / "logs").rglob("hparams.yml")
    given = yaml.safe_load(file.read_text())
    assert given["seed"] == 7
    assert (
        json.loads(given["concept"]) == json.loads((tmp_path / "out" / "selective_amnesia.json").read_text())["concept"]
    )
    assert set(given) == {spec.name for spec in flags_of(SelectiveAmnesiaConfig)}
    kept = list((tmp_path / "cache").glob("*/manifest.json"))
    assert len(kept) > 2
    assert all(file.stat().st_mtime_ns < manifest.stat().st_mtime_ns for manifest in kept)


def test_earlier_imports_work_and_are_warned_of(monkeypatch):
    monkeypatch.delitem(sys.modules, "sa_diffusers.command_line", raising=False)
    with pytest.warns(DeprecationWarning, match="sa_diffusers.command_line is sa_diffusers.commands.erase now"):
        from sa_diffusers.command_line import parse_config
    assert parse_config(["--concept", "a", "--surrogate", "b"]).concept == ["a"]
    with pytest.warns(DeprecationWarning, match="parse_args is in sa_diffusers.commands.evaluate now"):
        from sa_diffusers.evaluation.command_line import parse_args
    assert parse_args(["--base", "a", "--erased", "b", "--protocol", "class"]).images == 500


# What the package carries


def test_what_is_installed_holds_every_file_of_the_package(tmp_path):
    """Templates, vocabularies, YAML files, the embedded pipeline, py.typed."""
    built = tmp_path / "built"
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "build_py",
               "--build-lib", str(built)]  # fmt: skip
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    here, there = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*")
         if path.is_file() and "__pycache__" not in path.parts}
        for folder in (REPOSITORY / "sa_diffusers", built / "sa_diffusers")
    )  # fmt: skip
    assert here == there
    assert {"py.typed", "configurations/nudity.yaml", "models/embedded/pipeline/model_index.json"} <= there


def test_the_papers_experiments_go_by_their_names():
    assert {"mnist_vae", "brad_pitt_man", "nudity"} <= set(experiments())
    for name, path in experiments().items():
        assert read_settings(name) == read_settings(path)


TEXT = [name for name in experiments() if read_settings(name)["pretrained_model_name_or_path"] == BASE_NAME]


def test_every_experiment_is_run():
    assert {*TEXT, *EXPERIMENTS} == set(experiments())


@pytest.mark.parametrize("name", TEXT)
def test_the_papers_experiments_run_as_their_files_say(name, tiny_folder, tmp_path):
    """All of a file's settings but the sizes, on a model that was never trained."""
    sizes = {"num_surrogate_images": 4, "num_replay_images": 2, "num_fisher_samples": 2, "fisher_timesteps": 1,
             "num_inference_steps": 2, "gradient_accumulation_steps": 1, "train_batch_size": 2, "max_train_steps": 2,
             "num_eval_images": 1, "pretrained_model_name_or_path": tiny_folder}  # fmt: skip
    flags = [str(word) for size in sizes.items() for word in (f"--{size[0]}", size[1])]
    result = run_here(main, ["erase", "--config", name, *flags, "--output_dir", "out", "--report_to", "none"], tmp_path)
    assert result.returncode == 0, result.stderr
    used = json.loads((tmp_path / "out" / "selective_amnesia.json").read_text())
    given = read_settings(name)
    assert {"concept", "surrogate", "train_method", "ewc_weight", "use_ema"} <= set(given)
    for key in given.keys() - sizes.keys():
        value = [given[key]] if isinstance(used[key], list) and isinstance(given[key], str) else given[key]
        assert used[key] == (float(value) if isinstance(used[key], float) else value), key
    for file in ("report.json", "README.md", "unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "out" / file).is_file()

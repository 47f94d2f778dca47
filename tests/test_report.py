"""What a reader finds in report.md and report.html."""

import base64
import errno
import io
import json
import os
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sa_diffusers.commands.erase import parse_config
from sa_diffusers.configuration import CONFIG_NAME, HISTORY_NAME, SelectiveAmnesiaConfig
from sa_diffusers.data.sensitive import blurred, must_blur
from sa_diffusers.evaluation import Comparison
from sa_diffusers.report import write_report
from sa_diffusers.report.charts import HEIGHT, WIDTH, curve_svg, histogram
from sa_diffusers.report.terminal import format_table
from sa_diffusers.results import Report, Share, Summary
from sa_diffusers.results.figures import decimal, percent, share_text, significant, spread_text
from sa_diffusers.results.parts import ROLES
from sa_diffusers.results.statistics import wilson_interval

from .conftest import REPOSITORY

FILES = ["before_after.png", "report.html", "report.json", "report.md"]
HOSTILE = '<script>alert("1")</script> & *bold* | [link](http://example.com) `code`'
COLUMNS = {"clip_score": (27.3, 18.4), "giphy_probability": (0.93, 0.04), "breasts_exposed": (3, 0), "no_face": (0, 1)}
VOID = {"meta", "link", "img", "br", "line", "polyline", "polygon", "circle"}


def noisy(count, seed, size=24):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def share(hits, images):
    return {"share": hits / images, "interval": list(wilson_interval(hits, images))}


def row(name, role, images, seed=0):
    return {
        "name": name,
        "role": role,
        "images": images,
        "prompts": [f"a photo of {name}", f"{name} at night"],
        "seeds": [[100 + seed, 100 + seed + images - 1]],
        "change": {"rmse": 0.2, "rmse_between_seeds": 0.25, "relative": 0.8},
        "black": {"before": 0, "after": 0},
    }


def scores(images, seed):
    """Columns of every kind; some pictures have no probability."""
    generator = np.random.default_rng(seed)
    measured = {}
    for name, centres in COLUMNS.items():
        times = {}
        for time, centre in zip(("before", "after"), centres, strict=True):
            if name == "no_face":
                values = [float(value) for value in generator.random(images) < 0.2 + 0.6 * centre]
            elif name == "breasts_exposed":
                values = [float(value) for value in generator.poisson(centre, images)]
            else:
                values = (centre * (1 + 0.06 * generator.standard_normal(images))).tolist()
            if name == "giphy_probability":
                values[::5] = [None] * len(values[::5])
            times[time] = asdict(Summary.of(values))
        measured[name] = times
    return measured


def full_report(concept="Emma Stone", images=20):
    """A report with everything that one can have."""
    rows = []
    roles = ["concept", "concept", "surrogate", "neighbour", "neighbour", "remembered", "remembered"]
    names = [concept, f"{concept} (paraphrases)", "a young woman", "Emma Watson", "Ryan Gosling", "a dog", "a teapot"]
    for number, (name, role) in enumerate(zip(names, roles, strict=True)):
        entry = row(name, role, images, number * images)
        after = 0 if role == "concept" else images - number % 3
        entry["recognised"] = {"before": share(images - 1, images), "after": share(after, images)}
        entry["probability"] = {"before": 0.9131, "after": 0.00002 if role == "concept" else 0.9017}
        entry["entropy"] = {"before": 0.2113, "after": 1.7345}
        entry["scores"] = scores(images, number)
        entry["distance"] = {"openai/clip-vit": {"same_seed": 0.0124 * number, "between_seeds": 0.3017}}
        if role == "concept":
            entry["as_surrogate"] = {"before": share(0, images), "after": share(images - 2, images)}
            entry["probabilities"] = {"before": [0.95] * images, "after": [0.0] * images}
        rows.append(entry)
    rows[1]["black"]["after"] = 2
    quality = {"frechet_distance": 17.8214, "precision": 0.7113, "recall": 0.5127}
    return {
        "schema_version": 2,
        "sa_diffusers_version": "0.1.0",
        "protocol": "concept",
        "base_model": "CompVis/stable-diffusion-v1-4",
        "base_revision": "0123abcd",
        "erased_model": "emma-stone",
        "real_images": "coco, split val",
        "pairs": [{"concept": concept, "surrogate": "a young woman", "kind": "prompt"}],
        "configuration": SelectiveAmnesiaConfig(concept=concept, surrogate="a young woman", ewc_weight=12.5).to_dict(),
        "device": "cpu",
        "ending": {"how": "limit", "sentence": f"at the limit of 5 steps: {concept} is still there", "step": 5},
        "seconds": {"training": 61.25},
        "sampling": {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5, "batch_size": 8,
                     "resolution": 512},
        "versions": {"torch": "2.9.0", "diffusers": "0.36.0"},
        "interval": "Wilson, 95 %",
        "rows": rows,
        "black_images": {"before": 0, "after": 2},
        "classifier": {"name": "faces", "labels": names},
        "remembered": {
            "labels": names[2:],
            "before": {"recognised": 0.9512, "frechet_distance": 4.8431, "images": 100},
            "after": {"recognised": 0.9417, "frechet_distance": 5.1079, "images": 100},
            "against_base": {"frechet_distance": 0.2713, "precision": 0.9871, "recall": 0.9912},
        },
        "surrogate_samples": {concept: {"samples": {"probability": 0.0123, "entropy": 0.3781}}},
        "quality": [
            {"features": "inception-v3-compat", "neighbours": 3, "images": 100, "reference": "real images",
             "reference_images": 5000, "before": quality, "after": {**quality, "frechet_distance": 18.0391}},
            {"features": "inception-v3-compat", "neighbours": 3, "images": 100, "reference_images": 100,
             "reference": "the base model's own images", "after": {**quality, "frechet_distance": 2.1937}},
        ],
        "evaluators": [
            {"name": "clip-vit-base-patch32", "kind": "CLIP", "revision": "f00d", "columns": ["clip_score"],
             "labels": ["Emma Stone", "a young woman"]},
            {"name": "NudeNet", "version": "3.4.2", "threshold": 0.6, "columns": ["breasts_exposed"],
             "labels": ["FEMALE_BREAST_EXPOSED"]},
            {"name": "GIPHY celebrity detector", "weights": "best_model_states.pkl, sha256 12ab", "faces": "MTCNN"},
        ],
        "robustness": [
            {"attack": "textual inversion", "model": model, "images": 20, "black": 0, "recognised": share(hits, 20),
             "prompts": ["a photo of *"], "seeds": [[900, 919]],
             "scores": {"clip_called_concept": asdict(Summary.of([float(number < hits) for number in range(20)]))},
             "inversion": {"steps": 500, "learning_rate": 0.005, "start": "woman", "last_loss": 0.0417}}
            for model, hits in (("base", 19), ("erased", 3), ("control", 2))
        ] + [
            {"attack": "misspellings", "model": "erased", "images": 2, "prompts": ["Ema Stone", "Emma Ston"],
             "seeds": [[940, 940], [950, 950]], "scores": {"clip_score": asdict(Summary.of([17.5, 18.5]))},
             "words": ["one", "two"]},
        ],
    }  # fmt: skip


def bare_report():
    """A report with nothing that may be missing."""
    rows = [row("cat", "concept", 2), row("dog", "remembered", 1, 2)]
    rows[1]["change"] = {"rmse": 0.1, "rmse_between_seeds": None, "relative": None}
    sampling = {"sampler": "ddpm", "num_inference_steps": 4, "guidance_scale": 1.0}
    return {"schema_version": 2, "rows": rows, "sampling": sampling}


HISTORY = [
    {"step": 10 * (number + 1), "surrogate_loss": 0.5 / (number + 1), "replay_loss": 0.2, "ewc_penalty": 0.01 * number,
     "learning_rate": 1e-4}
    for number in range(40)
]  # fmt: skip


def grid_of(report, size=24):
    return [(entry["name"], noisy(6, 2 * number, size), noisy(6, 2 * number + 1, size))
            for number, entry in enumerate(report["rows"])]  # fmt: skip


def save(folder, report, size=24, history=None):
    folder.mkdir(exist_ok=True)
    if history is not None:
        (folder / HISTORY_NAME).write_text(json.dumps(history))
    Comparison(Report.from_dict(report), grid_of(report, size)).save(folder)
    return (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The page as a browser takes it apart: every element with its attributes, all text, and what is left open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open, self.tables = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables.append([])
        if tag in ("td", "th"):
            self.tables[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self):
        for attributes in self.of("img"):
            head, body = attributes["src"].split(",", 1)
            assert head == "data:image/png;base64"
            yield attributes["alt"], Image.open(io.BytesIO(base64.b64decode(body)))


def unescaped(markdown):
    """Markdown's text as its reader sees it."""
    text = re.sub(r"\\([\\`*_\[\]~#])", r"\1", markdown)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&#124;", "|"), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


def table_rows(markdown):
    lines = [line.strip("|").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return [
        [unescaped(cell.strip()) for cell in line] for line in lines if not line[0].strip().startswith((":--", "--"))
    ]


def rounded(text, mean, deviation):
    """Whether a text is this mean and standard deviation, rounded, with two digits of the deviation at least."""
    digits = [len(part.partition(".")[2]) for part in text.split(" ± ")]
    assert len(text.split(" ± ")[1].replace(".", "").lstrip("0")) >= 2
    return text == f"{mean:.{digits[0]}f} ± {deviation:.{digits[0]}f}" and digits[0] == digits[1]


def test_all_files_are_written_and_the_page_is_whole(tmp_path):
    report = full_report()
    _, text = save(tmp_path, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = Page(text)
    assert page.open == []
    assert text.startswith("<!doctype html>")
    assert page.of("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    assert all(attributes["alt"] for attributes in page.of("img"))
    assert all(attributes["aria-label"] for attributes in page.of("svg"))
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {attributes["href"] for attributes in page.of("a")} <= {f"#{anchor}" for anchor in anchors}


def test_every_table_is_the_same_in_both_files(tmp_path):
    markdown, text = save(tmp_path, full_report(), history=HISTORY)
    assert table_rows(markdown) == Page(text).tables
    assert len(table_rows(markdown)) > 100


def test_figures_are_those_of_the_report(tmp_path):
    report = full_report()
    markdown, _ = save(tmp_path, report, history=HISTORY)
    rows = table_rows(markdown)
    for entry in report["rows"]:
        (line,) = [
            line for line in rows if line[0] == entry["name"] and line[-1] not in ("", "0.378") and "80.0" in line
        ]
        recognised = entry["recognised"]["after"]
        low, high = recognised["interval"]
        figures = f"{100 * recognised['share']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        assert figures in line
        assert ("<0.001" if entry["role"] == "concept" else "0.902") in line
        assert f"{entry['entropy']['before']:.3f}" in line
        # Four columns of scores have a table of their own, a line for each.
        for name, times in entry["scores"].items():
            (line,) = [line for line in rows if line[:2] == [name, entry["name"]]]
            after = times["after"]
            if name == "clip_score":
                assert rounded(line[3], after["mean"], after["std"])
            elif name == "giphy_probability":
                assert line[3].endswith(" (n = 16)")
                assert rounded(line[3].removesuffix(" (n = 16)"), after["mean"], after["std"])
            elif name == "breasts_exposed":
                assert line[3] == f"{after['sum']:.0f} ({after['mean']:.3g})"
            else:
                low, high = wilson_interval(int(after["sum"]), after["count"])
                assert line[3] == f"{percent(after['mean'])} [{percent(low)}, {percent(high)}]"
        seeds = f"{entry['seeds'][0][0]} to {entry['seeds'][0][1]}"
        prompts = f"“a photo of {entry['name']}”; “{entry['name']} at night”"
        assert [entry["name"], entry["role"], "20", prompts, seeds] in rows
    inception = [line for line in rows if line[0] == "inception-v3-compat"]
    assert [line[2:] for line in inception] == [
        ["before", "100", "17.821", "0.711", "0.513"],
        ["after", "100", "18.039", "0.711", "0.513"],
        ["after", "100", "2.194", "0.711", "0.513"],
    ]
    assert "real images (5,000)" in inception[0]
    assert ["400", significant(HISTORY[-1]["surrogate_loss"])] in rows
    assert ["ewc_weight", "12.5", "–"] in rows
    assert ["training", "61.2"] in rows


def test_the_summary_says_in_words_what_the_tables_say(tmp_path):
    report = full_report()
    markdown, text = save(tmp_path, report)
    told = markdown.split("## Summary")[1].split("##")[0]
    told = unescaped(" ".join(told.split()))
    assert "“Emma Stone” was to be erased into “a young woman”." in told
    assert "“Emma Stone”, 20 images: recognised in 95.0 % [76.4, 99.1] before and 0.0 % [0.0, 16.1] after" in told
    assert "recognised as the surrogate in 0.0 % [0.0, 16.1] before and 90.0 % [69.9, 97.2] after" in told
    clip = report["rows"][0]["scores"]["clip_score"]
    figures = [
        f"{clip[time]['mean']:.{digits}f} ± {clip[time]['std']:.{digits}f}"
        for time, digits in (("before", 1), ("after", 2))
    ]
    assert f"clip_score {figures[0]} before and {figures[1]} after" in told
    assert "None is recognised less often than before." in told
    assert "95.1 % of images before and 94.2 % after" in told
    assert "black all over: 0 before, 2 after" in told
    assert "The strongest attack is “textual inversion”: recognised in base 95.0 % [76.4, 99.1], erased" in told
    for line in told.split(" - "):
        assert line.strip("- ") in Page(text).text
    report["rows"][4]["recognised"]["after"] = share(11, 20)
    told = unescaped(save(tmp_path, report)[0])
    assert (
        "The largest loss is that of “Ryan Gosling”: 95.0 % [76.4, 99.1] before and 55.0 % [34.2, 74.2] after." in told
    )


def test_neighbours_have_a_table_of_their_own(tmp_path):
    markdown, _ = save(tmp_path, full_report())
    parts = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", markdown, flags=re.DOTALL | re.MULTILINE))
    damage = {line[0] for line in table_rows(parts["Collateral damage: neighbours of the concept"])}
    assert damage == {"prompted with", "Emma Watson", "Ryan Gosling", "score", *COLUMNS}
    remembered = {tuple(line[:2]) for line in table_rows(parts["Remembered concepts"]) if line[0] not in COLUMNS}
    assert remembered >= {("a young woman", "surrogate"), ("a dog", "remembered"), ("a teapot", "remembered")}
    assert "Emma W" not in parts["Remembered concepts"]


@pytest.mark.parametrize("classified", [True, False])
def test_few_scores_have_a_line_for_each_row_and_no_table_of_their_own_without_a_classifier(tmp_path, classified):
    report = full_report()
    for entry in report["rows"]:
        entry["scores"] = {"clip_score": entry["scores"]["clip_score"]}
        if not classified:
            for name in ("recognised", "as_surrogate", "probability", "probabilities", "entropy"):
                entry.pop(name, None)
    if not classified:
        for name in ("classifier", "remembered", "surrogate_samples"):
            del report[name]
    rows = table_rows(save(tmp_path, report)[0])
    title = "clip_score after, mean ± standard deviation"
    header = next(line for line in rows if title in line)
    assert header[0] == "prompted with"
    assert ("change, %" in header) != classified
    scored = report["rows"][0]["scores"]["clip_score"]["after"]
    assert rounded(rows[rows.index(header) + 1][header.index(title)], scored["mean"], scored["std"])


def test_every_figure_says_what_measured_it_and_how_to_have_it_again(tmp_path):
    markdown, _ = save(tmp_path, full_report())
    rows = table_rows(markdown.split("## How to reproduce each figure")[1])
    for expected in (
        ["NudeNet", "version", "3.4.2"],
        ["NudeNet", "threshold", "0.6"],
        ["NudeNet", "labels", "FEMALE_BREAST_EXPOSED"],
        ["GIPHY celebrity detector", "weights", "best_model_states.pkl, sha256 12ab"],
        ["sampler", "ddim"],
        ["guidance scale", "7.5"],
        ["torch", "2.9.0"],
        ["real images", "coco, split val"],
        ["base revision", "0123abcd"],
    ):
        assert expected in rows, expected
    measured_by = {line[0]: line[1] for line in rows}
    assert measured_by["clip_score"] == "clip-vit-base-patch32"
    assert measured_by["breasts_exposed"] == "NudeNet"
    # An evaluator that does not name its columns may have measured any that nobody else names.
    assert measured_by["giphy_probability"] == "GIPHY celebrity detector"
    assert measured_by["recognised, as its surrogate"] == "faces"


def test_the_command_of_the_report_gives_the_same_settings_again(tmp_path, monkeypatch):
    report = full_report()
    markdown, _ = save(tmp_path, report)
    SelectiveAmnesiaConfig(**report["configuration"]).save(tmp_path / CONFIG_NAME)
    (command,) = re.findall(r"^    accelerate launch examples/train_sa.py (.*)$", markdown, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    again = parse_config(command.split()).to_dict()
    assert again == {**report["configuration"], "output_dir": "reproduced"}
    given = {**report, "command": ["python", "examples/evaluate_sa.py", "--concept", "Emma Stone"]}
    assert "    python examples/evaluate_sa.py --concept 'Emma Stone'" in save(tmp_path, given)[0]


def test_robustness_is_shown_whatever_was_measured(tmp_path):
    markdown, text = save(tmp_path, full_report())
    part = markdown.split("## Robustness")[1].split("\n## ")[0]
    header, *rows = table_rows(part)
    assert header == [
        "attack", "model", "images", "black", "recognised, %", "clip_called_concept, %", "inversion steps",
        "inversion learning rate", "inversion start", "inversion last loss", "clip_score, mean ± standard deviation",
        "words",
    ]  # fmt: skip
    figures = "15.0 [5.2, 36.0]"
    assert rows[1] == ["textual inversion", "erased", "20", "0", figures, figures, "500", "0.005", "woman", "0.0417",
                       "–", "–"]  # fmt: skip
    assert rows[3] == ["misspellings", "erased", "2", "–", "–", "–", "–", "–", "–", "–", "18.00 ± 0.71", "one; two"]
    drawn = table_rows(markdown.split("Prompts and seeds of the attacks")[1].split("How the images")[0])
    assert drawn[1:] == [
        ["textual inversion", "“a photo of *”", "900 to 919"],
        ["misspellings", "“Ema Stone”; “Emma Ston”", "940; 950"],
    ]
    assert "textual inversion" in Page(text).text


def test_agreement_with_the_base_at_the_same_seeds_is_told(tmp_path):
    markdown, _ = save(tmp_path, full_report())
    rows = table_rows(markdown)
    header = next(line for line in rows if line[:2] == ["prompted with", "role"])
    (line,) = [line for line in rows if line[:2] == ["a dog", "remembered"] and len(line) == len(header)]
    assert line[header.index("distance in clip-vit")] == "0.062 (0.302)"
    assert ["distance", "openai/clip-vit"] in [line[:2] for line in rows]


def test_histograms_count_every_figure_there_is(tmp_path):
    report = full_report()
    markdown, text = save(tmp_path, report)
    # Two rows of the concept, three columns that are not yes or no, and the classifier.
    drawings = [attributes["aria-label"] for attributes in Page(text).of("svg")]
    assert [drawing for drawing in drawings if "giphy_probability" in drawing] == [
        "Histogram. giphy_probability, “Emma Stone”: 16 of 20 images before, 16 after",
        "Histogram. giphy_probability, “Emma Stone (paraphrases)”: 16 of 20 images before, 16 after",
    ]
    assert "Histogram. the classifier's probability, “Emma Stone”: 20 of 20 images before, 20 after" in drawings
    assert len(drawings) == 8
    assert not any("no_face" in drawing for drawing in drawings)
    part = unescaped(markdown).split("Images in each bin of breasts_exposed, “Emma Stone”\n")[0]
    assert part.count("| :--- | ---: | ---: |") >= 1
    first = report["rows"][0]["scores"]["clip_score"]
    lines = table_rows(markdown.split("## Score histograms")[1].split("\n## ")[0])
    header = lines.index(["clip_score", "before", "after"])
    counted = []
    for line in lines[header + 1 :]:
        if line[1:] == ["before", "after"]:
            break
        counted.append(line)
    assert sum(int(line[1]) for line in counted) == len(first["before"]["values"])
    assert sum(int(line[2]) for line in counted) == len(first["after"]["values"])


def test_a_histogram_has_a_bin_for_each_whole_number_and_few_for_many_values():
    counted = histogram([0, 2, 2], [1, 1, 1])
    assert counted.edges == (-0.5, 0.5, 1.5, 2.5)
    assert (counted.before, counted.after) == ((1, 0, 2), (0, 3, 0))
    values = np.random.default_rng(0).normal(size=10_000).tolist()
    counted = histogram(values, [0.0])
    assert 8 <= len(counted.before) <= 20
    assert all(edge == round(edge, 1) for edge in counted.edges)
    assert (sum(counted.before), sum(counted.after)) == (10_000, 1)
    assert sum(histogram([0.25, 0.25], []).before) == 2
    with pytest.raises(ValueError, match="give at least one"):
        histogram([], [])


def test_no_name_can_become_markup(tmp_path):
    report = full_report(HOSTILE)
    report["base_model"] = report["classifier"]["name"] = report["evaluators"][0]["name"] = HOSTILE
    report["robustness"][0]["attack"] = HOSTILE
    report["rows"][3]["scores"] = {HOSTILE: report["rows"][3]["scores"]["clip_score"]}
    report["rows"][0]["scores"] = {HOSTILE: report["rows"][0]["scores"]["clip_score"]}
    markdown, text = save(tmp_path, report, history=HISTORY)
    page = Page(text)
    assert page.open == []
    assert not page.of("script")
    assert {name for name, _ in page.elements} <= {
        "html", "head", "meta", "title", "link", "style", "body", "header", "h1", "h2", "h3", "dl", "div", "dt", "dd",
        "nav", "ul", "li", "a", "main", "section", "p", "figure", "figcaption", "img", "span", "table", "thead",
        "tbody", "tr", "th", "td", "details", "summary", "pre", "code", "svg", "line", "text", "polygon", "polyline",
        "circle",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE in page.text
    prose = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "<" not in prose
    assert not re.search(r"(?<!\\)[\]\[`*]", prose.replace("![Before", "").replace("](before_after.png)", ""))
    assert HOSTILE in unescaped(prose)
    # A bar in a name is not a cell.
    assert table_rows(markdown) == page.tables


def test_the_page_loads_nothing(tmp_path):
    _, text = save(tmp_path, full_report(), history=HISTORY)
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    assert not re.search(r"url\(|@import|https?:", text)
    (policy,) = [item["content"] for item in page.of("meta") if item.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy


def detail(picture):
    """How much neighbouring pixels differ, on a scale to 255."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    return np.abs(np.diff(pixels, axis=1)).mean()


def test_what_is_to_be_blurred_is_blurred_in_every_file(tmp_path):
    report = {**full_report(), "blur": True}
    markdown, text = save(tmp_path, report, size=256)
    pictures = list(Page(text).pictures())
    assert len(pictures) == 7 * 12
    shown = noisy(1, 0, 256)[0]
    for alt, picture in pictures:
        assert alt.endswith("blurred")
        assert picture.size == (192, 192)
        # Nothing is left but the mean colours of 8 by 8 fields: smaller, the picture holds all that it held.
        small = picture.resize((8, 8), Image.Resampling.BOX)
        again = np.asarray(small.resize((192, 192), Image.Resampling.BICUBIC), dtype=float)
        assert np.abs(again - np.asarray(picture, dtype=float)).max() < 12
        assert detail(picture) < 1 < detail(shown) / 50
    for said in (unescaped(markdown), Page(text).text):
        assert "blurred on purpose" in said
    with Image.open(tmp_path / "before_after.png") as sheet:
        tile = sheet.crop((sheet.width - 64 - 8, sheet.height - 64 - 8, sheet.width - 12, sheet.height - 12))
        assert detail(tile) < 2
    clear = Page(save(tmp_path, {**full_report(), "blur": False}, size=256)[1])
    assert min(detail(picture) for _, picture in clear.pictures()) > 20
    assert "blurred" not in clear.text


def test_blurring_keeps_size_and_mean_colour_only():
    picture = Image.new("RGB", (40, 30), (200, 10, 90))
    assert blurred(picture).size == (40, 30)
    assert blurred(picture).getpixel((3, 3)) == (200, 10, 90)
    sharp = noisy(1, 3, 64)[0]
    mirrored = np.asarray(sharp).copy()
    for top in range(0, 64, 8):
        for left in range(0, 64, 8):
            mirrored[top : top + 8, left : left + 8] = mirrored[top : top + 8, left : left + 8][:, ::-1]
    # Two pictures with the same means cannot be told apart.
    assert np.array_equal(np.asarray(blurred(sharp)), np.asarray(blurred(Image.fromarray(mirrored))))


def test_pictures_are_the_grids_own_at_their_seeds_the_concept_first(tmp_path):
    report = full_report()
    report["rows"] = report["rows"][::-1]
    page = Page(save(tmp_path, report)[1])
    pictures = list(page.pictures())
    assert [alt for alt, _ in pictures[:2]] == [
        "Emma Stone (paraphrases), before, seed 120",
        "Emma Stone (paraphrases), before, seed 121",
    ]
    (name, before, after) = grid_of(report)[-1]
    assert name == "Emma Stone"
    shown = [picture for alt, picture in pictures if alt.startswith("Emma Stone,")]
    for picture, drawn in zip(shown, [*before, *after], strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(drawn))


def test_a_report_without_anything_optional(tmp_path):
    markdown, text = save(tmp_path, bare_report())
    page = Page(text)
    titles = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert titles == [
        "Summary",
        "Before and after",
        "The erased concept",
        "Remembered concepts",
        "How to reproduce each figure",
    ]
    for name in ("cat", "dog"):
        assert name in page.text
        assert name in markdown
    assert "“cat” was to be erased." in markdown
    assert "changed by 80.0 % of the distance between two seeds" in markdown
    assert "None" not in markdown
    assert "None" not in page.text
    assert not page.of("svg")
    assert table_rows(markdown) == page.tables


def test_an_evaluation_elsewhere_shows_the_erased_folders_training(tmp_path):
    erased = tmp_path / "erased"
    erased.mkdir()
    (erased / HISTORY_NAME).write_text(json.dumps(HISTORY))
    SelectiveAmnesiaConfig(concept="cat", surrogate="dog", ewc_weight=7.25).save(erased / CONFIG_NAME)
    markdown, text = save(tmp_path / "evaluation", {**bare_report(), "erased_model": str(erased)})
    assert "EWC penalty: 0 at step 10, 0.39 at step 400" in markdown
    assert len(Page(text).of("svg")) == 3
    assert "| ewc\\_weight | 7.25 | – |" in markdown
    # It is not this folder's configuration: no command is made of it.
    assert "accelerate launch" not in markdown


def test_two_reports_of_one_comparison_are_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        save(tmp_path / name, full_report(), history=HISTORY)
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_thousands_of_prompts_and_seeds_do_not_fill_the_page(tmp_path):
    report = bare_report()
    report["rows"][0] |= {
        "images": 4703,
        "prompts": [f"prompt number {number}" for number in range(4703)],
        "seeds": [[7 * number, 7 * number] for number in range(4703)],
    }
    markdown, _ = save(tmp_path, report)
    assert "prompt number 11”; and 4,691 more, in rows\\[0\\] of report.json" in markdown
    assert "77; and 4,691 more" in markdown
    assert "prompt number 12" not in markdown


def test_long_label_sets_are_cut_and_say_where_the_rest_is(tmp_path):
    report = full_report()
    report["evaluators"][2]["labels"] = [f"celebrity {number}" for number in range(2306)]
    markdown, _ = save(tmp_path, report)
    assert "celebrity 59; and 2,246 more, in evaluators of report.json" in markdown
    assert "celebrity 60" not in markdown


@pytest.mark.parametrize("value", [0.0, 4e-15, 0.7, 123456.0])
def test_a_curve_of_any_size_stays_in_its_frame(value):
    points = [(1, value), (2, value / 2)]
    drawn = curve_svg(points, "losses", "loss")
    (places,) = re.findall(r'points="([^"]+)"', drawn)
    for place in places.split():
        x, y = map(float, place.split(","))
        assert 0 < x < WIDTH
        assert 0 < y < HEIGHT
    assert curve_svg(points[:1], "losses", "loss").count("<circle") == 1
    # There is no half step.
    assert re.findall(r'y="187" text-anchor="middle">([^<]+)<', drawn) == ["0", "1", "2"]


def test_nothing_is_rounded_to_all_or_to_none():
    assert [percent(value) for value in (0, 1 / 4703, 0.5, 4702 / 4703, 1, 2.023)] == [
        "0.0", "<0.1", "50.0", ">99.9", "100.0", "202.3"
    ]  # fmt: skip
    assert share_text(Share(1.0, (0.862, 0.9999999999999999))) == "100.0 [86.2, 100.0]"
    assert [decimal(value) for value in (None, 0.0, 3e-6, -1e-9, 4.8473)] == ["–", "0.000", "<0.001", "0.000", "4.847"]
    pairs = [(27.04, 1.43), (0.041, 0.00289), (9300.2, 812.0), (0.5, None), (2, 0)]
    assert [spread_text(*pair) for pair in pairs] == [
        "27.0 ± 1.4", "0.0410 ± 0.0029", "9,300 ± 812", "0.5", "2 ± 0"
    ]  # fmt: skip
    assert [significant(value) for value in (None, 12, 0.000512, 1234.5, -2.5)] == [
        "–", "12", "0.000512", "1,234", "-2.5"
    ]  # fmt: skip


def test_the_totals_of_the_detectors_are_tables_of_their_own(tmp_path):
    def found(share, mean, probabilities):
        return {
            "without_face": {"share": share, "interval": [share / 2, share * 1.5]},
            "probability": {"count": 9, "mean": mean, "std": 0.21},
            "top1": {"share": share, "interval": [0, 0.5]} if mean is not None else None,
            "top5": [{"prompt": "a", "seed": 1, "probability": value} for value in probabilities],
        }

    faces = {"name": "brad pitt", "celebrity": "Brad Pitt", "images": 10, "before": found(0.1, 0.62, [0.99, 0.5])}
    bodies = {"name": "I2P", "images": 4703, "threshold": 0.6, "before": {"female_breasts": 1321, "total": 1400}}
    report = {
        "schema_version": 2,
        "rows": [],
        "sampling": {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5},
        "totals": [
            {**faces, "after": found(0.4, None, [])},
            {**bodies, "after": {"female_breasts": 7, "total": 12}},
        ],
    }
    write_report(Report.from_dict(report), [], tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        for shown in (
            "0.62",
            "0.990, 0.500",
            "20.0, 60.0",
            "1,321",
            "4703 images",
            "female breasts",
            "0.6 or more",
        ):
            assert shown in text, (name, shown)


SENSITIVE = [
    "nudity", "a Naked person", "NSFW_content", "n.s.f.w.", "ＮＵＤＥ", "na\u200bked", "nudité", "hentai's",
    "genitalias", "semi-nude", "erotic art", "裸女の写真", "누드화", "обнажённая женщина", "NUDITA\u0300",
    "Pornography",
]  # fmt: skip
HARMLESS = ["Brad Pitt", "van Gogh style", "Essex", "Middlesex", "denuded hills", "church", "sneaker", "numb", "0", ""]


def test_what_is_nudity_or_of_its_kind_is_blurred():
    assert [text for text in SENSITIVE if not must_blur("auto", [text])] == []
    assert [text for text in HARMLESS if must_blur("auto", [text])] == []
    assert must_blur("auto", [*HARMLESS, "naked"])
    assert must_blur("yes", HARMLESS)
    assert not must_blur("no", SENSITIVE)
    with pytest.raises(ValueError, match='blur="maybe" is not one of auto, yes, no'):
        must_blur("maybe", [])
    paper = REPOSITORY / "sa_diffusers" / "configurations"
    for path in paper.glob("*.yaml"):
        concepts = yaml.safe_load(path.read_text())["concept"]
        concepts = [concepts] if isinstance(concepts, str) else concepts
        assert must_blur("auto", [str(concept) for concept in concepts]) == (path.stem == "nudity"), path


def state(folder):
    """Of which report each file is, by the steps of its sampler; None for a file that is not there."""
    steps = {}
    for name in ("report.json", "report.md", "report.html"):
        path = folder / name
        text = path.read_text() if path.is_file() else ""
        found = re.search(r'"num_inference_steps": (\d+)|ddpm, (\d+) steps', text)
        steps[name] = found and int(found[1] or found[2])
    return steps


def test_a_report_that_is_there_is_whole_wherever_the_writing_was_stopped(tmp_path, monkeypatch):
    old, new = bare_report(), bare_report()
    new["sampling"] = {**new["sampling"], "num_inference_steps": 5}
    moved = type(tmp_path).replace
    for stop in range(5):
        folder = tmp_path / str(stop)
        save(folder, old)
        steps = []

        def kill(self, target, stop=stop, steps=steps):
            steps.append(target)
            if len(steps) > stop:
                raise KeyboardInterrupt
            return moved(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "replace", kill)
            if stop < 4:
                with pytest.raises(KeyboardInterrupt):
                    save(folder, new)
            else:
                save(folder, new)
        left = state(folder)
        assert left["report.json"] in (None, left["report.md"])
        assert left["report.json"] == (5 if stop == 4 else None)
        # What a kill leaves behind does not stay.
        (folder / ".report-writing").mkdir(exist_ok=True)
        (folder / ".report-writing" / "report.md").write_text("half")
        save(folder, new)
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert set(state(folder).values()) == {5}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one_whole(tmp_path):
    save(tmp_path, bare_report())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / ".report-writing").write_text("in the way")
    with pytest.raises(OSError, match="the report could not be written into .*: free some space"):
        save(tmp_path, full_report())
    (tmp_path / ".report-writing").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_under_a_report_is_told_in_one_sentence(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sa_diffusers.files.single._write_beside", full)
    with pytest.raises(OSError) as caught:
        save(tmp_path, full_report())
    assert str(caught.value) == (
        f"the report could not be written into {tmp_path} ([Errno 28] No space left on device): free some space on "
        "that disk or choose another folder, and run the same command again; the images that were sampled are kept"
    )


NAMES = st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(
    [
        HOSTILE,
        "a|b",
        "```",
        "` ``",
        "~~~",
        "1. a",
        "- a",
        "---",
        "<!-- a",
        "a\\|b",
        "\u202eabc",
        "\x00\x1b[31m",
        "a\n\n# b",
    ]
)


@settings(max_examples=40, deadline=None)
@given(NAMES, NAMES)
def test_any_name_is_text_and_nothing_else(tmp_path_factory, name, other):
    folder = tmp_path_factory.mktemp("report")
    report = full_report("concept")
    report["rows"][3]["name"] = report["base_model"] = report["evaluators"][0]["name"] = name
    report["rows"][4]["name"] = report["classifier"]["name"] = report["robustness"][0]["attack"] = other
    report["pairs"][0] = {"concept": name, "surrogate": other, "kind": "prompt"}
    report["command"] = ["python", "examples/evaluate_sa.py", "--concept", name]
    write_report(Report.from_dict(report), [], folder)
    markdown, text = ((folder / file).read_text(encoding="utf-8") for file in ("report.md", "report.html"))
    page = Page(text)
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "link", "style", "body", "header", "h1", "h2", "h3", "dl", "div", "dt", "dd",
        "nav", "ul", "li", "a", "main", "section", "p", "figure", "figcaption", "span", "table", "thead", "tbody",
        "tr", "th", "td", "details", "summary", "pre", "code", "svg", "line", "text", "polygon", "polyline",
    }  # fmt: skip
    prose = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not any("<" in line or line.startswith(("```", "~~~")) for line in prose)
    for said in (markdown, text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", said)
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in prose]
    for line, width, following in zip(prose, widths, widths[1:], strict=False):
        if line.startswith("|") and following:
            assert width == following
    (command,) = re.findall(r"(?m)^    python (?:.|\n    )*", markdown)
    assert command.startswith("    python examples/evaluate_sa.py --concept ")


def test_a_long_value_is_cut_in_both_files_alike(tmp_path):
    report = full_report()
    report["real_images"] = "far" + " and far" * 1000
    markdown, text = save(tmp_path, report)
    assert table_rows(markdown) == Page(text).tables
    (line,) = [line for line in table_rows(markdown) if line[0] == "real images"]
    assert len(line[1]) == 2000
    assert line[1].endswith("…")


def test_no_place_on_the_writers_machine_is_in_page_or_markdown(tmp_path):
    place = "/srv/alice smith/secret models"
    report = full_report()
    report["base_model"] = f"{place}/base"
    report["erased_model"] = f"{place}/emma"
    report["classifier"]["name"] = f"{place}/classifier"
    report["evaluators"][0]["name"] = f"{place}/clip"
    report["quality"][0]["features"] = f"{place}/dino"
    report["models"] = {"base": f"{place}/base", "control": f"{place}/control"}
    report["rows"][0]["distance"] = {f"{place}/dino": {"same_seed": 0.1, "between_seeds": 0.2}}
    report["pairs"][0] = {"concept": "cat", "surrogate": f"{place}/dogs", "kind": "images"}
    report["configuration"] |= {"pretrained_model_name_or_path": f"{place}/base", "fisher": f"{place}/fisher",
                                "surrogate": [f"{place}/dogs"], "output_dir": f"{place}/out"}  # fmt: skip
    report["command"] = ["evaluate_sa.py", "--base", f"{place}/base", f"--clip={place}/clip", "--real", "~/coco"]
    for text in save(tmp_path, report):
        assert "alice" not in text
        assert "secret" not in text
        for name in ("base", "emma", "classifier", "clip", "dino", "control", "dogs", "fisher"):
            assert name in text
        assert "--base base --clip=clip --real coco" in text


@pytest.mark.parametrize(
    ("share_after", "outcome"), [(0, "forgotten"), (8, "partly"), (58, "not forgotten"), (None, "not measurable")]
)
def test_the_verdict_stands_at_the_top_of_both_files(tmp_path, share_after, outcome):
    report = bare_report()
    if share_after is not None:
        report["rows"][0] |= {"images": 60, "recognised": {"before": share(60, 60), "after": share(share_after, 60)}}
    markdown, text = save(tmp_path, report)
    assert markdown.splitlines()[2].startswith(f"> {outcome.upper()}: “cat”")
    line = unescaped(markdown.splitlines()[2].removeprefix("&gt; ").removeprefix("> "))
    page = Page(text)
    assert {"class": f"verdict {outcome.replace(' ', '-')}"} in page.of("p")
    assert line in page.text
    assert page.text.index(line) < page.text.index("Base model" if "Base model" in page.text else "Images")


@pytest.mark.parametrize(
    ("how", "beginning"),
    [("done", "TRAINING DONE: "), ("limit", "TRAINING STOPPED AT ITS LIMIT: "), ("given up", "TRAINING GIVEN UP: "),
     ("otherwise", "TRAINING ENDED: ")],
)  # fmt: skip
def test_how_the_training_ended_stands_under_the_verdict(tmp_path, how, beginning):
    sentence = f"forgotten is 0.31, {HOSTILE} was asked for"
    markdown, text = save(tmp_path, {**bare_report(), "ending": {"how": how, "sentence": sentence, "step": 12}})
    lines = markdown.splitlines()
    assert lines[2].startswith("> NOT MEASURABLE: ")
    assert lines[4].startswith(f"> {beginning}forgotten is 0.31, &lt;script&gt;")
    page = Page(text)
    assert {"class": f"verdict {how.replace(' ', '-')}"} in page.of("p")
    assert f"{beginning}{sentence}." in page.text
    assert page.text.index(beginning) < page.text.index("Images")
    assert not page.of("script")
    assert json.loads((tmp_path / "report.json").read_text())["ending"] == {
        "how": how, "sentence": sentence, "step": 12,
    }  # fmt: skip


def test_a_training_that_measured_nothing_says_nothing_of_its_end(tmp_path):
    markdown, text = save(tmp_path, bare_report())
    assert "TRAINING" not in markdown and "TRAINING" not in text
    assert "ending" not in json.loads((tmp_path / "report.json").read_text())
    with pytest.raises(ValueError, match="the report holds other values than a run writes .*ending.sentence"):
        Report.from_dict({**bare_report(), "ending": {"how": "done", "sentence": 3}})


def test_the_summary_says_what_the_verdict_means_and_what_was_not_measured(tmp_path):
    report = bare_report()
    report["rows"][0] |= {"images": 60, "recognised": {"before": share(60, 60), "after": share(8, 60)}}
    for text in (unescaped(text) for text in save(tmp_path, report)):
        assert "“Partly” of a concept means: it is recognised less often than before" in text
        assert "Not measured here: attempts to bring the concept back; neighbours of the concept." in text
    bare = unescaped(save(tmp_path, bare_report())[0])
    assert "Not measured here: whether anything still takes the images for the concept (no classifier" in bare
    # Everything is there.
    assert "Not measured here" not in save(tmp_path, full_report())[0]


def test_each_of_several_concepts_and_all_damage_is_told_in_the_summary(tmp_path):
    report = full_report(images=60)
    report["pairs"].append({"concept": "Emma Watson", "surrogate": "a young woman", "kind": "prompt"})
    report["rows"][0]["concept"] = "Emma Stone"
    report["rows"][1]["concept"] = "Emma Watson"
    report["rows"][1]["recognised"]["after"] = share(59, 60)
    for number in (3, 4, 5, 6):
        report["rows"][number]["paired"] = {"lost": 30, "gained": 0}
    told = unescaped(save(tmp_path, report)[0])
    assert "- Forgotten: “Emma Stone” is recognised in 0.0 % [0.0, 6.0] of images, before in 98.3 %" in told
    assert "- Not forgotten: “Emma Stone (paraphrases)” is recognised in 98.3 %" in told
    # The verdict's line names three.
    assert "- Damaged, of 4 that should have stayed: “Emma Watson”, “Ryan Gosling”, “a dog”, “a teapot”." in told


def test_the_concepts_rows_come_first_in_every_table(tmp_path):
    report = full_report()
    report["rows"] = report["rows"][::-1]
    markdown, text = save(tmp_path, report)
    roles = [line[1] for line in table_rows(markdown) if len(line) > 1 and line[1] in ROLES]
    reproduced = roles[-len(report["rows"]) :]
    assert reproduced == ["concept"] * 2 + ["surrogate"] + ["neighbour"] * 2 + ["remembered"] * 2
    # Where the rest of a long list of prompts is, is told by its place in the file.
    report["rows"][-1]["prompts"] = [str(number) for number in range(20)]
    assert "and 8 more, in rows\\[6\\] of report.json" in save(tmp_path, report)[0]


def test_a_table_that_stacks_on_a_phone_stays_a_table_for_who_hears_the_page(tmp_path):
    """Its rows are blocks; each cell then says its column, and every part its role."""
    page = Page(save(tmp_path, full_report())[1])
    stacked = [attributes for attributes in page.of("table") if attributes.get("class") == "stacks"]
    assert stacked
    assert all(attributes["role"] == "table" for attributes in stacked)
    cells = [attributes for attributes in page.of("td") if "data-title" in attributes]
    assert {"prompts", "value", "how", "recognised after, %"} <= {attributes["data-title"] for attributes in cells}
    assert all(attributes["role"] == "cell" for attributes in cells)
    assert len(stacked) < len(page.of("table"))


def test_what_a_detector_counted_is_summed_up_and_its_labels_are_folded(tmp_path):
    report = bare_report()
    report["rows"] = report["rows"][:1]
    report["rows"][0]["scores"] = {f"label {number}": scores(20, 0)["breasts_exposed"] for number in range(6)}
    report["totals"] = [{"name": "I2P", "images": 4703, "threshold": 0.6,
                         "before": {"female_breasts": 1321, "total": 1400},
                         "after": {"female_breasts": 7, "total": 12}}]  # fmt: skip
    markdown, text = save(tmp_path, report)
    assert "“I2P”, 4,703 images: 1,400 detections with a score of 0.6 or more before and 12 after." in markdown
    assert "label 0, in total" not in markdown.split("##")[1]
    assert [row for row in table_rows(markdown) if row[0] in ("female breasts", "total")] == [
        ["female breasts", "1,321", "7"],
        ["total", "1,400", "12"],
    ]
    page = Page(text)
    assert page.of("details")
    assert not page.of("svg")


@pytest.mark.parametrize("name", ["sneaker (trained phrasings)", "a rainbow trout under a very long wooden bridge"])
def test_the_terminals_table_fits_eighty_columns(name):
    report = full_report(name, 60)
    report["rows"][3]["name"] = "Pneumonoultramicroscopicsilicovolcanoconiosis"
    table = format_table(Report.from_dict(report)).split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "|  98.3 % [91.1, 99.7] |   0.0 % [0.0, 6.0]    | 80 %" in table
    told = format_table(Report.from_dict(report))
    assert f'"{name}": taken for the surrogate in 96.7 % [88.6, 99.1] of images after' in told
    # Names are broken, never cut.
    letters = "".join(line.split("|")[0].strip() for line in table.splitlines())
    assert name.replace(" ", "") in letters.replace(" ", "")

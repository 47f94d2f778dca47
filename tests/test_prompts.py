import re
import warnings

import pytest
from datasets import Dataset
from PIL import Image

from sa_diffusers import pair_concepts, replay_prompts
from sa_diffusers.data.captions import Vocabulary, generate_captions, load_vocabulary, what_names
from sa_diffusers.data.classes import class_name
from sa_diffusers.data.concepts import image_files
from sa_diffusers.data.phrasings import check_phrasings, fill_template, warn_of_cut_prompts
from sa_diffusers.names import names_concept


def test_one_pair():
    (pair,) = pair_concepts(["Brad Pitt"], ["a middle aged man"])
    assert (pair.concept, pair.surrogate.kind, pair.surrogate.value) == ("Brad Pitt", "prompt", "a middle aged man")


def test_several_concepts_share_one_surrogate():
    pairs = pair_concepts(["nudity", "naked", "erotic"], ["a person wearing clothes"])
    assert [pair.surrogate.value for pair in pairs] == ["a person wearing clothes"] * 3


def test_several_pairs():
    pairs = pair_concepts(["Brad Pitt", "Angelina Jolie"], ["a man", "a woman"])
    assert [pair.surrogate.value for pair in pairs] == ["a man", "a woman"]


def test_surrogate_kinds(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    kinds = [pair.surrogate.kind for pair in pair_concepts(["a", "b", "c"], ["dog", str(tmp_path), "uniform_noise"])]
    assert kinds == ["prompt", "images", "noise"]


def test_prompt_with_a_slash_is_a_prompt():
    assert pair_concepts(["cat"], ["a dog and/or a wolf"])[0].surrogate.kind == "prompt"


@pytest.mark.parametrize(
    ("concepts", "surrogates", "message"),
    [
        ([], ["a man"], "concept is empty"),
        (["  "], ["a man"], "concept is empty"),
        (["cat"], [""], "surrogate is empty"),
        (["cat"], ["cat"], "equals its surrogate"),
        (["Cat"], ["a  cat"], "equals its surrogate"),
        (["a", "b", "c"], ["d", "e"], "3 concepts and 2 surrogates do not pair up"),
        (["cat"], ["dog", "cow"], "1 concepts and 2 surrogates do not pair up"),
        (["cat", "Cat"], ["dog"], "stands twice"),
        (["cat"], ["./no/such/folder"], "does not exist"),
        (["cat"], ["data/men"], 'looks like a folder, but there is none: write "./data/men" if you mean a folder'),
        (["cat"], ["data\\men"], "looks like a folder, but there is none"),
        (["..."], ["a man"], 'concept "..." holds no letter'),
        (["\u200b\u200b"], ["a man"], r'concept "\\u200b\\u200b" holds no letter'),
        (["cat"], ["-- !"], 'surrogate "-- !" holds no letter'),
        (["Brad Pitt", "brad_pitt"], ["dog"], "stands twice"),
        (["ＣＡＴ"], ["cat"], "equals its surrogate"),
        (["布拉德·皮特"], ["布拉德皮特"], "equals its surrogate"),
        (
            ["Brad Pitt", "Brad Pit"],
            ["a man"],
            'concept "Brad Pit" is nearly "Brad Pitt": did you mean one and the same',
        ),
        (["Brad Pitt", "Brda Pitt"], ["a man"], "did you mean one and the same"),
        (["Angelina Jolie", "Tom Hanks"], ["a woman", "Angelina Jolei"], "is nearly the concept"),
    ],
)
def test_bad_pairs(concepts, surrogates, message):
    with pytest.raises(ValueError, match=message):
        pair_concepts(concepts, surrogates)


@pytest.mark.parametrize(
    ("concepts", "surrogates", "named"),
    [
        (["cat"], ["a photo of a CAT"], ["cat"]),
        (["cat"], ["cats"], ["cat"]),
        (["cat", "dog"], ["a dog on a mat", "a cow"], ["dog"]),
        (["angry cat"], ["cat"], []),
        (["cat"], ["a dog"], []),
    ],
)
def test_a_surrogate_that_names_the_concept_is_warned_of(concepts, surrogates, named):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair_concepts(concepts, surrogates)
    found = [re.search('names "(.*)", which is to be forgotten', str(warning.message)) for warning in caught]
    assert [match[1] for match in found] == named


def test_words_without_quotes_and_names_with_commas_are_told_of():
    """`--concept Brad Pitt --surrogate a man` is two of each; a list with commas is one name."""
    with pytest.raises(ValueError, match='surrogate "a" is an article alone: put names of several words in quotes'):
        pair_concepts(["Brad", "Pitt"], ["a", "man"])
    with pytest.warns(UserWarning, match='"Brad Pitt, Angelina Jolie" is one concept of that name: several are given'):
        pair_concepts(["Brad Pitt, Angelina Jolie"], ["a man"])


def test_surrogate_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        pair_concepts(["cat"], [str(tmp_path)])


@pytest.mark.parametrize(
    ("concepts", "surrogates"),
    [
        (["cat", "car"], ["dog"]),
        (["nude", "nudes"], ["a person"]),
        (["a red sneaker", "red sneakers"], ["boot"]),
        (["cat"], ["black / white dog"]),
        (["Angelina Jolie", "Angelina Jones"], ["a woman"]),
    ],
)
def test_pairs_that_are_meant(concepts, surrogates):
    assert [pair.concept for pair in pair_concepts(concepts, surrogates)] == concepts


def test_folders_that_are_nearly_there(tmp_path, monkeypatch):
    (tmp_path / "data set" / "women").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data set" / "women" / "one.png")
    monkeypatch.chdir(tmp_path)
    for text in ("data set/womne", "./data set/womne"):
        with pytest.raises(ValueError, match='did you mean "data set/women"'):
            pair_concepts(["cat"], [text])
    monkeypatch.chdir(tmp_path / "data set")
    with pytest.warns(UserWarning, match='"women" is a prompt, although a folder of images is called so'):
        assert pair_concepts(["cat"], ["women"])[0].surrogate.kind == "prompt"
    # Where an erasure is evaluated, the folder may be gone.
    kinds = [
        pair_concepts(["cat"], [text], must_exist=False)[0].surrogate.kind for text in ("data/men", "and/or a dog")
    ]
    assert kinds == ["images", "prompt"]


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    for name in ("b.png", "a.jpg", "._a.jpg", "notes.txt", "c.GIF"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.png", "c.GIF"]


@pytest.mark.parametrize(
    ("template", "concept", "expected"),
    [
        ("{}", "Brad Pitt", "Brad Pitt"),
        ("a photo of a {}", "sneaker", "a photo of a sneaker"),
        ("a photo of a {}", "ankle boot", "a photo of an ankle boot"),
        ("A {} here", "apple", "An apple here"),
        ("a photo of a {}", "a middle aged man", "a photo of a middle aged man"),
        ("the {}", "the moon", "the moon"),
    ],
)
def test_templates_take_the_right_article(template, concept, expected):
    assert fill_template(template, concept) == expected


@pytest.mark.parametrize(
    ("prompt", "concept", "expected"),
    [
        ("Brad Pitt on stage", "brad pitt", True),
        ("brad  pitt's house", "Brad Pitt", True),
        ("two sneakers", "sneaker", True),
        ("a t-shirt", "shirt", False),
        ("a shirt", "t-shirt", False),
        ("a scatter plot", "cat", False),
        ("a photo of a dress", "a dress", True),
        # Scripts without spaces, and names with dots
        ("一张布拉德·皮特的照片", "布拉德·皮特", True),
        ("一张布拉德皮特的照片", "布拉德·皮特", True),
        ("一张布拉德·皮特的照片", "布拉德皮特", True),
        ("一张Brad Pitt的照片", "brad pitt", True),
        ("布拉德皮特2024年", "布拉德·皮特", True),
        ("ブラッド・ピットの写真", "ブラッドピット", True),
        ("ﾌﾞﾗｯﾄﾞ･ﾋﾟｯﾄ", "ブラッド・ピット", True),
        ("브래드피트의 사진", "브래드 피트", True),
        ("รูปแบรดพิตต์", "แบรดพิตต์", True),
        ("रामायण", "राम", False),
        ("राम और सीता", "राम", True),
        ("портрет: БРЭД ПИТТ", "Брэд Питт", True),
        # Normal forms, width, what cannot be seen
        ("Beyonce\u0301 live", "Beyoncé", True),
        ("beyonce live", "Beyoncé", False),
        ("ＢＲＡＤ　ＰＩＴＴ", "brad pitt", True),
        ("b\u200brad\u00ad pitt", "brad pitt", True),
        ("STRASSE", "Straße", True),
        # Joined words
        ("photo_of_brad_pitt_smiling", "brad pitt", True),
        ("brad-pitt", "brad pitt", True),
        ("brad\u2011pitt", "brad pitt", True),
        ("BradPitt", "brad pitt", True),
        ("spider man", "Spider-Man", True),
        ("JK Rowling", "J. K. Rowling", True),
        ("abradpitt", "brad pitt", False),
        ("a t\u2011shirt", "shirt", False),
        ("a dog-friendly hotel", "dog", False),
        ("a Picasso-style painting", "Picasso", True),
        # Plurals and possessives
        ("three boxes", "box", True),
        ("ladies in red", "lady", True),
        ("a lady", "ladies", True),
        ("many ties", "tie", True),
        ("a sneaker", "sneakers", True),
        ("the sneakers’ soles", "sneaker", True),
        ("two women", "woman", True),
        ("a catalogue", "cat", False),
        ("a new car", "news", False),
        ("C++ code", "c++", True),
        ("anything", "...", False),
    ],
)
def test_naming_goes_by_whole_words(prompt, concept, expected):
    assert names_concept(prompt, concept) is expected


def test_built_in_captions_are_thousands_and_seeded_and_never_name_the_concept():
    captions = replay_prompts("diverse", 4000, 0, ["Tiger Woods", "dog"])
    assert len(set(captions)) == 4000
    assert captions == replay_prompts("diverse", 4000, 0, ["Tiger Woods", "dog"])
    assert captions != replay_prompts("diverse", 4000, 1, ["Tiger Woods", "dog"])
    for word in ("tiger", "woods", "dog"):
        assert not any(names_concept(caption, word) for caption in captions)
    assert not any("{" in caption for caption in captions)


def test_garment_captions_leave_out_the_concept_and_hold_the_others_evenly():
    captions = replay_prompts("garments", 900, 0, ["shirt"])
    counts = {name: sum(names_concept(caption, name) for caption in captions)
              for name in load_vocabulary("garments").subjects}  # fmt: skip
    assert counts.pop("shirt") == 0
    assert set(counts.values()) == {100}


def subjects_in(captions: list[str], vocabulary: str) -> set[str]:
    """Those that captions name, the longest first: "cat face" is no "cat"."""
    subjects = sorted(load_vocabulary(vocabulary).subjects, key=len, reverse=True)
    return {next(subject for subject in subjects if subject in caption) for caption in captions}


@pytest.mark.parametrize(
    ("concept", "gone"),
    [
        ("red heart", {"red heart"}),
        ("Red-Hearts", {"red heart"}),
        ("grinning cat", {"grinning cat"}),
        ("cat", {"cat face", "grinning cat"}),
        ("heart", {f"{colour} heart" for colour in ("red", "blue", "green", "yellow", "purple", "black")}),
        ("a bear in the snow", {"bear"}),
        ("fireengine", {"fire engine"}),
    ],
)
def test_captions_leave_out_what_shows_the_concept_and_nothing_that_shares_a_word_with_it(concept, gone):
    captions = generate_captions(load_vocabulary("icons"), 400, 0, avoid=[concept])
    assert subjects_in(captions, "icons") == set(load_vocabulary("icons").subjects) - gone
    assert not any(names_concept(caption, concept) for caption in captions)


def test_no_caption_names_a_concept_by_parts_that_name_nothing():
    captions = generate_captions(load_vocabulary("diverse"), 2000, 0, avoid=["black and white"])
    assert any("and white photo" in caption for caption in captions)
    assert not any("black and white" in caption for caption in captions)
    vocabulary = Vocabulary(["dog stand", "dog cart", "hat"], ["a {adjective} {}"], [], {"adjective": ["hot"]})
    assert generate_captions(vocabulary, 3, 0, avoid=["hot dogs"]) == ["a hot hat"] * 3
    vocabulary.subjects.remove("hat")
    with pytest.raises(ValueError, match="no caption of this vocabulary avoids hot dogs: bring replay prompts"):
        generate_captions(vocabulary, 3, 0, avoid=["hot dogs"])


@pytest.mark.parametrize(
    ("concept", "named"),
    [("noto style", "noto"), ("in the style of Van Gogh", "van gogh"), ("a photo of Brad Pitt", "brad pitt"),
     ("red heart", "red heart"), ("person", "person")],
)  # fmt: skip
def test_a_concept_is_named_without_the_words_that_say_only_what_kind_of_thing_it_is(concept, named):
    assert what_names(concept)[-1] == named


def test_held_out_phrasings_are_never_trained_on():
    for name in ("garments", "diverse", "icons"):
        vocabulary = load_vocabulary(name)
        assert vocabulary.held_out_templates
        assert not set(vocabulary.held_out_templates) & set(vocabulary.templates)


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a dog\n\na cow\n", encoding="utf-8")
    prompts = replay_prompts(str(path), 5, 0, ["cat"])
    assert len(prompts) == 5
    assert set(prompts) == {"a dog", "a cow"}


def test_prompts_from_a_dataset_column(tmp_path):
    Dataset.from_dict({"prompt": ["a dog", "a cow"], "other": ["x", "y"]}).to_parquet(tmp_path / "train.parquet")
    assert set(replay_prompts(f"{tmp_path}:prompt", 2, 0, ["cat"])) == {"a dog", "a cow"}
    assert set(replay_prompts(f"{tmp_path}:other:train", 2, 0, ["cat"])) == {"x", "y"}
    assert set(replay_prompts(str(tmp_path), 2, 0, ["cat"])) == {"a dog", "a cow"}
    with pytest.raises(ValueError, match='no column "text"; it has prompt, other'):
        replay_prompts(f"{tmp_path}:text", 2, 0, ["cat"])


def test_replay_prompts_that_name_the_concept_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a dog\nBrad Pitt smiling\n", encoding="utf-8")
    with pytest.raises(ValueError, match='1 of 2 replay prompts name the concept "brad pitt".*"Brad Pitt smiling"'):
        replay_prompts(str(path), 5, 0, ["brad pitt"])
    with pytest.warns(UserWarning, match='1 of 2 prompts name "brad pitt" and are left out'):
        assert set(replay_prompts(str(path), 5, 0, ["brad pitt"], drop_naming=True)) == {"a dog"}
    path.write_text("Brad Pitt smiling\nbrad_pitt\n", encoding="utf-8")
    with pytest.raises(ValueError, match='all 2 prompts name "brad pitt", so that none is left'):
        replay_prompts(str(path), 5, 0, ["brad pitt"], drop_naming=True)


def test_bad_sources(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        replay_prompts(str(empty), 5, 0, ["cat"])
    with pytest.raises(ValueError, match="neither one of 'diverse', 'garments', 'icons', nor a file"):
        replay_prompts("nothing-like-it", 5, 0, ["cat"])
    with pytest.raises(ValueError, match='did you mean "garments"'):
        replay_prompts("garmnets", 5, 0, ["cat"])
    with pytest.raises(ValueError, match="there is no such file.*did you mean .*empty.txt"):
        replay_prompts(str(tmp_path / "emtpy.txt"), 5, 0, ["cat"])
    with pytest.raises(ValueError, match="could not be loaded"):
        replay_prompts("nobody/nothing:text", 5, 0, ["cat"])
    with pytest.raises(ValueError, match="no caption of this vocabulary avoids"):
        generate_captions(load_vocabulary("garments"), 5, 0, load_vocabulary("garments").subjects)


@pytest.mark.parametrize(("count", "share", "empty"), [(20, 0.15, 3), (7, 0.0, 0), (9, 0.9, 8)])
def test_the_empty_prompt_is_spread_over_the_replay_prompts(count, share, empty):
    prompts = replay_prompts("garments", count, 0, ["shirt"], share)
    assert len(prompts) == count
    places = [place for place, prompt in enumerate(prompts) if not prompt]
    assert len(places) == empty
    assert [prompt for prompt in prompts if prompt] == replay_prompts("garments", count - empty, 0, ["shirt"])
    gaps = {second - first for first, second in zip(places, places[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_class_is_found_by_any_of_its_names():
    labels = ["tench, Tinca tinca", "great white shark, white shark", "Crane, lift", "crane, bird"]
    assert class_name("Tinca tinca", labels) == class_name("0", labels) == labels[0]
    assert class_name("White Shark", labels) == labels[1]
    with pytest.raises(ValueError, match=r'"crane" is the name of several classes: give one of the numbers 2 \(Crane'):
        class_name("crane", labels)
    with pytest.raises(ValueError, match='did you mean "Tinca tinca"'):
        class_name("tinka tinca", labels)
    with pytest.raises(ValueError, match="give one of c0, .*, c19, ..., or a number from 0 to 999"):
        class_name("dog", [f"c{index}" for index in range(1000)])


def test_names_outside_of_what_the_text_encoder_reads_are_refused(tiny_objective):
    """The tiny tokenizer makes a token of each letter, and reads 30 of them."""
    long = "a picture of a wooden house by the sea with {}"
    for pairs in (pair_concepts(["Brad Pitt"], ["a man"]), pair_concepts(["cat"], ["dog"])):
        with pytest.raises(ValueError, match=r'reads 32 tokens, and "(Brad Pitt|cat)" ends at token \d+: shorten it'):
            check_phrasings(tiny_objective, pairs, ["{}", long])
    with pytest.raises(ValueError, match='and "a man with a very long.*ends at token'):
        check_phrasings(tiny_objective, pair_concepts(["cat"], ["a man with a very long grey beard and a hat"]), ["{}"])
    # Partly outside, and just inside.
    with pytest.raises(ValueError, match='"Brad Pitt" ends at token 33'):
        check_phrasings(tiny_objective, pair_concepts(["Brad Pitt"], ["a man"]), ["x" * 23 + " {}"])
    check_phrasings(tiny_objective, pair_concepts(["Brad Pitt"], ["a man"]), ["x" * 22 + " {}", "{} " + "y" * 50])


def test_what_is_the_same_to_the_tokenizer_is_refused(tiny_objective):
    with pytest.raises(ValueError, match='makes nothing of "🔫"|"🔫" and "a man"|makes nothing'):
        check_phrasings(tiny_objective, pair_concepts(["🔫"], ["a man"]), ["{}"])
    same = pair_concepts(["cat"], ["ﾃﾞ ｃ a t"])[0]
    same = type(same)("CAT", type(same.surrogate)("prompt", "cat"))
    with pytest.raises(ValueError, match='to the model\'s tokenizer "CAT" and "cat" are the same'):
        check_phrasings(tiny_objective, [same], ["{}"])


def test_prompts_that_are_cut_are_counted(tiny_objective, recwarn):
    warn_of_cut_prompts(tiny_objective, ["a dog", "a cow"], "x")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="prompts.txt: 1 of 2 prompts are longer than what the text encoder reads"):
        warn_of_cut_prompts(tiny_objective, ["a dog", "a dog " * 20, "a dog"], "prompts.txt")

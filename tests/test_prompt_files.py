"""Whatever holds prompts is read the same way, or refused in a sentence."""

import json
import os

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa_diffusers.data.phrasings import read_templates
from sa_diffusers.data.prompt_files import read_prompts, read_texts, split_source

EXPECTED = ["a coat, on a table", 'a "red" bag']
CSV = 'case_number,prompt,sd_seed\r\n0,"a coat, on a table",1\r\n1,"a ""red"" bag",2\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", 'a coat, on a table\r\n\r\n  a  "red" bag \r'),
        ("p", 'a coat, on a table\na "red" bag'),
        ("p.csv", CSV),
        ("p.csv", CSV.replace("prompt", "Caption").replace(",on", ",on")),
        ("p.csv", 'case;prompt\n0;a coat, on a table\n1;"a ""red"" bag"\n2;\n3\n'),
        ("p.tsv", 'prompt\tseed\na coat, on a table\t1\n"a ""red"" bag"\t2\n'),
        ("p.json", json.dumps(EXPECTED)),
        ("p.json", json.dumps({"prompts": EXPECTED, "seed": 3})),
        ("p.json", json.dumps([{"text": EXPECTED}, {"text": None}, {"other": 1}])),
        ("p.jsonl", "".join(json.dumps({"file_name": "x", "text": text}) + "\n\n" for text in EXPECTED)),
        ("p.ndjson", "".join(json.dumps(text) + "\n" for text in EXPECTED)),
        ("p.json", "".join(json.dumps({"caption": text}) + "\n" for text in EXPECTED)),
    ],
)
def test_all_forms_and_encodings_give_the_same_prompts(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_texts(tmp_path / name, "x") == EXPECTED
    assert read_prompts(str(tmp_path / name)) == EXPECTED


def test_columns_are_named_behind_a_colon(tmp_path):
    (tmp_path / "p.csv").write_text("de,en,prompt\nein Hund,a dog,x\neine Kuh,a cow,y\n")
    assert read_texts(f"{tmp_path}/p.csv:en", "x") == ["a dog", "a cow"]
    with pytest.raises(ValueError, match='there is no column "fr"; it has de, en, prompt'):
        read_texts(f"{tmp_path}/p.csv:fr", "x")
    (tmp_path / "p.jsonl").write_text('{"a": "a dog", "b": ["a cow", ["a hen", null]]}\n')
    assert read_texts(f"{tmp_path}/p.jsonl:b", "x") == ["a cow", "a hen"]
    with pytest.raises(ValueError, match="no column is called prompt, text or caption; it has a, b: name one"):
        read_texts(tmp_path / "p.jsonl", "x")
    (tmp_path / "p.jsonl").write_text('{"text": "a dog", "prompt": "a cow"}\n')
    with pytest.raises(ValueError, match="more than one column may hold the prompts; it has text, prompt"):
        read_texts(tmp_path / "p.jsonl", "x")


def test_what_is_no_file_and_what_is_half_a_character_is_told(tmp_path):
    """Half a character could be sampled with, and then not be written."""
    os.mkfifo(tmp_path / "pipe.txt")
    for name in (f"{tmp_path}/pipe.txt", "/dev/zero"):
        with pytest.raises(ValueError, match="it is a device or a pipe: give a text file"):
            read_prompts(name)
    (tmp_path / "p.json").write_text('["a dog", "a \\ud83d dog"]')
    with pytest.raises(ValueError, match=r"a \\ud83d dog holds half of a character"):
        read_prompts(str(tmp_path / "p.json"))
    (tmp_path / "p.json").write_text('["a \\ud83d\\ude00 dog"]')
    assert read_prompts(str(tmp_path / "p.json")) == ["a \U0001f600 dog"]


def test_parquet_files_and_datasets(tmp_path):
    features = Features({"prompt": Value("string"), "kind": ClassLabel(names=["a", "b"])})
    dataset = Dataset.from_dict({"prompt": ["a dog", None, "\ufeffa cow"], "kind": [0, 1, 1]}, features)
    dataset.to_parquet(tmp_path / "train.parquet")
    for source in (f"{tmp_path}/train.parquet", f"{tmp_path}/train.parquet:prompt", f"{tmp_path}:prompt:train"):
        assert read_texts(source, "x") == ["a dog", "a cow"]
    for source in (f"{tmp_path}/train.parquet:kind", f"{tmp_path}:kind"):
        with pytest.raises(ValueError, match="0 is not text, but of type int: name a column of text"):
            read_texts(source, "x")
    with pytest.raises(ValueError, match="could not be loaded"):
        read_texts(f"{tmp_path}:prompt:none", "x")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        read_texts(tmp_path / "train.parquet", "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "ein schöner Schuh, größer als früher".encode("cp1252"), "is not in UTF-8.*: save it as UTF-8"),
        ("p.txt", "a dog".encode("utf-16-le"), "looks like UTF-16 .little endian. without a byte order mark"),
        ("p.csv", "prompt\na dog".encode("utf-16-be"), "looks like UTF-16 .big endian. without a byte order mark"),
        ("p.txt", b"\xff\xfea\x00b", "says that it is in UTF-16-LE, but is not"),
        ("p.txt", b"\x89PNG\r\n\x1a\n" + b"\0" * 50 + b"\xff", "no text at all|not in UTF-8"),
        ("p.csv", b"prompt,prompt\na,b\n", 'the column "prompt" stands twice'),
        ("p.csv", b"prompt,seed\na coat, on a table,1\n", "row 2 has 3 cells, the header 2: put quotes"),
        ("p.csv", b'prompt\n"a dog', "is not a valid table"),
        ("p.csv", b"", "no column is called prompt"),
        ("p.csv:sd", b"prompt,sd\na dog,1\na cow,2.5\n", 'column "sd" holds numbers: name a column of text'),
        ("p.txt:prompt", b"a dog\n", 'is a text file, which has no column "prompt"'),
        ("p.json", b"{", "is not valid JSON"),
        ("p.json", b"3", "holds neither a list nor columns"),
        ("p.json", b'["a", {"text": "b"}]', "holds objects and other things"),
        ("p.json", b"[" * 100_000, "is not valid JSON"),
        ("p.json:text", b'["a"]', 'none is called "text"'),
        ("p.jsonl", b'{"text": "a"}\n{"text"\n', "line 2, is not valid JSON"),
        ("p.jsonl", b'{"text": 3}\n', "row 0: 3 is not text, but of type int"),
    ],
)
def test_what_holds_no_prompts_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name.partition(":")[0]).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_texts(f"{tmp_path}/{name}", f'replay_prompts="{name}"')
    assert "\n" not in str(error.value)


def test_drive_letters_and_colons_in_names_are_no_columns(tmp_path, monkeypatch):
    assert split_source("C:\\prompts.txt") == ("C:\\prompts.txt", None, None)
    assert split_source("C:/p.csv:text") == ("C:/p.csv", "text", None)
    assert split_source("user/name:text:test") == ("user/name", "text", "test")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b.txt").write_text("a dog")
    (tmp_path / "a:b.csv").write_text("x:y\na cow")
    assert read_texts("a:b.txt", "x") == ["a dog"]
    assert read_texts("a:b.csv:x:y", "x") == ["a cow"]
    with pytest.raises(ValueError, match="there is no such file"):
        read_texts("C:\\prompts.txt", "x")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.csv").write_text("prompt\na {}\n")
    assert read_templates("~/p.csv") == ["a {}"]
    assert read_prompts("~/p.csv:prompt") == ["a {}"]


def test_a_file_that_is_nearly_there_is_asked_about(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog")
    with pytest.raises(ValueError, match='does not exist and could not be read; did you mean ".*/prompts.txt"'):
        read_prompts(tmp_path / "promts.txt")


@pytest.mark.parametrize("source", ["", " ", "\0", "x" * 5000, "~nobody-of-that-name/p.txt", ":", "::", "/", "a/b/c"])
def test_names_that_are_none(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        read_prompts(source)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='prompt,text"\n\r;{}[]:\t\ufeffé 0', max_size=80).map(str.encode),
        st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(st.sampled_from(["prompt", "a"]), inner, max_size=2), max_leaves=6)
        .map(lambda value: json.dumps(value).encode()),
    ),
    suffix=st.sampled_from([".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"]),
)  # fmt: skip
def test_any_bytes_are_prompts_or_one_sentence(tmp_path, content, suffix):
    file = tmp_path / f"p{suffix}"
    file.write_bytes(content)
    try:
        texts = read_texts(file, "x")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
    else:
        assert all(text and text == " ".join(text.split()) and "\ufeff" not in text for text in texts)

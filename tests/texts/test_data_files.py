"""Column files, and what `datasets` loads: what is read, repaired, counted and refused."""

import json
from pathlib import Path

import datasets
import pytest
from task_cases import FILE

from fastdistil.data import files, tags

UNER = Path(__file__).parents[3] / "shared" / "data" / "uner"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_words_with_a_hash_are_words_and_invalid_starts_are_repaired(tmp_path):
    found = files.read([write(tmp_path / "da_x-test.tsv", FILE)], "tokens")
    assert found.dataset["words"][:] == [["Anna", "bor", "i", "Ny", "By"], ["#Paris", "10 000", "\x01", "Bo"]]
    assert found.dataset["tags"][:] == [["B-PER", "O", "O", "B-LOC", "I-LOC"], ["B-LOC", "O", "O", "B-PER"]]
    assert found.dataset["language"][:] == ["da", "da"]
    assert found.labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert found.iob2
    (report,) = found.reports
    assert (report.rows, report.words, report.repaired, report.odd) == (2, 9, 1, 2)
    assert "1 invalid I- read as B-; 2 words are empty or hold blanks or control characters" in report.line()


@pytest.mark.parametrize(
    ("text", "words", "found"),
    [
        ("a O\nb B-X\n\n# c = 1\n# O\n", [["a", "b"], ["#"]], [["O", "B-X"], ["O"]]),
        ("EU NNP B-NP B-ORG\r\nrejects VBZ B-VP O\r\n", [["EU", "rejects"]], [["B-ORG", "O"]]),
        ("-DOCSTART- -X- O O\n\nEU NNP B-NP O\n", [["EU"]], [["O"]]),
        ("1\tAnna\tB-PER\t-\tx\n2\tbor\tO\t-\tx\n", [["Anna", "bor"]], [["B-PER", "O"]]),
        ("x\u2028y\u00a0z\tB-X\n\tI-X\n", [["x\u2028y\u00a0z", ""]], [["B-X", "I-X"]]),
        ("\ufeffa\tNOUN\nb\tX\n", [["a", "b"]], [["NOUN", "X"]]),
        ("#\tO\n#only\n##\tB-X\n", [["#", "##"]], [["O", "B-X"]]),
    ],
    ids=["blanks", "CoNLL 2003", "documents", "numbered", "separators of Unicode", "parts of speech", "comments"],
)
def test_column_files(tmp_path, text, words, found):
    got = files.read([write(tmp_path / "a.conll", text)], "tokens")
    assert (got.dataset["words"][:], got.dataset["tags"][:]) == (words, found)


@pytest.mark.parametrize(
    ("given", "repaired"),
    [
        ("O I-X I-X", ("O B-X I-X", 1)),
        ("B-X I-Y I-Y", ("B-X B-Y I-Y", 1)),
        ("I-X O I-X", ("B-X O B-X", 2)),
        ("B-X I-X B-X", ("B-X I-X B-X", 0)),
    ],
)
def test_repair(given, repaired):
    assert tags.repair(given.split()) == (repaired[0].split(), repaired[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\tO\tO\n", r":2: has 3 columns, expected 2, as before"),
        ("a\tO\nb\n", r":2: has 1 column, expected 2, as before"),
        ("a\nb\n", r":1: has 1 column, expected a word and a tag, with a tab between them"),
        ("a\tO\nb\tB-X\n\nc\tBPER\n", r":4: tag is 'BPER', expected O, B-TYPE or I-TYPE"),
        ("", r"is empty, expected words and tags"),
    ],
)
def test_bad_column_files_name_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "a.tsv", text)
    with pytest.raises(ValueError, match=f"{path}{message}" if message.startswith(":") else f"{path}: {message}"):
        files.read([path], "tokens")


def test_bytes_that_are_no_utf8_name_the_line(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\tO\n\xff\tO\n")
    with pytest.raises(ValueError, match=r"a.tsv:2: is not UTF-8: invalid start byte at byte 0"):
        files.read([path], "tokens")


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.tsv", "a\tO\n")
    files.read([path], "tokens")
    write(path, "b\tO\n")
    assert files.read([path], "tokens").dataset["words"][:] == [["b"]]


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    rows = [{"tokens": ["Anna", "bor"], "ner_tags": ["I-PER", "O"]}, {"tokens": ["#1"], "ner_tags": ["O"]}]
    write(tmp_path / "da.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "da.parquet")
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "I-PER"])),
        }
    )
    coded = datasets.Dataset.from_dict({"tokens": made["tokens"][:], "ner_tags": [[1, 0], [0]]}, features=features)
    coded.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": coded, "test": coded.select([1])}).save_to_disk(tmp_path / "dict")
    for name in ("da.jsonl", "da.parquet", "saved", "dict"):
        found = files.read([f"xx={tmp_path / name}"], "tokens")
        assert found.dataset["tags"][:] == [["B-PER", "O"], ["O"]], name
        assert found.dataset["words"][:] == made["tokens"][:]
        assert found.reports[0].repaired == 1
        assert found.dataset["language"][:] == ["xx", "xx"]
    assert len(files.read([tmp_path / "dict"], "tokens", split="test").dataset) == 1
    renamed = made.rename_column("tokens", "w")
    renamed.to_parquet(tmp_path / "r.parquet")
    assert len(files.read([tmp_path / "r.parquet"], "tokens", columns={"words": "w"}).dataset) == 2
    with pytest.raises(ValueError, match="r.parquet: has the columns w, ner_tags, expected words or tokens for words"):
        files.read([tmp_path / "r.parquet"], "tokens")
    with pytest.raises(ValueError, match="dict: has the splits train, test, expected validation"):
        files.read([tmp_path / "dict"], "tokens", split="validation")


def test_texts_and_pairs(tmp_path):
    one = write(tmp_path / "en.csv", 'text,label\n"a, b",NA\nNone,01\n')
    two = write(tmp_path / "de.tsv", 'sentence1\tsentence2\tlabel\nhe "said\tb\t1\n')
    three = write(
        tmp_path / "fr.jsonl", '{"text": "x", "label": 10}\n{"text": "y", "label": 9}\n{"text": "z", "label": -1}\n'
    )
    found = files.read([one], "text")
    assert found.dataset[:]["text"] == ["a, b", "None"]
    assert found.dataset[:]["label"] == ["NA", "01"]
    pair = files.read([two], "text").dataset[0]
    assert (pair["text"], pair["text_pair"], pair["label"], pair["language"]) == ('he "said', "b", "1", "de")
    numbers = files.read([three], "text")
    assert numbers.labels == ["9", "10"]
    assert numbers.dataset["label"][:] == ["10", "9", None]
    assert numbers.reports[0].unknown == 1
    with pytest.raises(ValueError, match="en.csv: has no column 'text_pair', which other files have"):
        files.read([two, one], "text")
    plain = files.read([write(tmp_path / "sw.txt", "one\n\ntwo\n")], "text", labelled=False)
    assert "label" not in plain.dataset.column_names


def test_words_without_tags(tmp_path):
    lines = write(tmp_path / "sv.txt", "Anna bor  i Lund\n\n# och\n")
    rows = write(tmp_path / "da.jsonl", '{"text": "Bo er her"}\n')
    words = write(tmp_path / "fo.conll", "Bo\ner\n\nher\n")
    tagged = write(tmp_path / "en.tsv", "a\tB-X\n")
    found = files.read([lines, rows, words, tagged], "tokens", labelled=False)
    expected = [["Anna", "bor", "i", "Lund"], [], ["#", "och"], ["Bo", "er", "her"], ["Bo", "er"], ["her"], ["a"]]
    assert found.dataset["words"][:] == expected
    assert found.dataset.column_names == ["words", "language", "file"]
    assert found.labels == []


@pytest.mark.parametrize(
    ("name", "text", "task", "message"),
    [
        ("a.jsonl", '{"words": ["a"], "tags": ["O"]}\n{"words": ["a"], "ta\n', "tokens", r"a.jsonl:2: is no JSON: Unterminated string starting at column 18"),
        ("a.jsonl", '{"words": ["a"], "tags": ["O", "O"]}\n', "tokens", r"a.jsonl: row 1: has 1 words and 2 tags, expected a tag for every word"),
        ("a.jsonl", '{"words": "a", "tags": ["O"]}\n', "tokens", r"a.jsonl: row 1: words is 'a', expected a list of texts"),
        ("a.jsonl", '{"text": null, "label": "x"}\n', "text", r"a.jsonl: row 1: text is None, expected text"),
        ("a.docx", "x", "text", r"a.docx: ends in '.docx', expected one of .jsonl"),
        ("a.conllu", "x", "tokens", r"a.conllu: is CoNLL-U, expected a file of words and one tag each"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, text, task, message):
    with pytest.raises(ValueError, match=message):
        files.read([write(tmp_path / name, text)], task)


def test_missing_files_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.tsv: no such file"):
        files.read([tmp_path / "none.tsv"], "tokens")
    with pytest.raises(ValueError, match="read: task is 'ner', expected 'tokens' or 'text'"):
        files.read([], "ner")
    with pytest.raises(ValueError, match="read: paths is empty"):
        files.read([], "text")


def test_other_label_sets_are_reported_and_can_be_left_out(tmp_path):
    paths = [write(tmp_path / "en.tsv", "a\tB-PER\n"), write(tmp_path / "hr.tsv", "a\tB-OTH\nb\tI-OTH\nc\tB-PER\n")]
    found = files.read(paths, "tokens")
    assert "entities of type OTH are in hr alone" in found.notes()
    without = files.read(paths, "tokens", ignore_types=["OTH"])
    assert without.labels == ["O", "B-PER", "I-PER"]
    assert without.dataset["tags"][1] == ["O", "O", "B-PER"]
    assert "2 words of ignored types read as O" in without.notes()[1]
    with pytest.raises(ValueError, match="pos.tsv: has the tag 'NOUN', which is not IOB2, as .*en.tsv is"):
        files.read([paths[0], write(tmp_path / "pos.tsv", "a\tNOUN\n")], "tokens")


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("da_ddt-ud-test.tsv", "da"),
        ("fr.txt", "fr"),
        ("zh-train.jsonl", "zh"),
        ("train.tsv", "train"),
        ("dev.tsv", "dev"),
        ("eng.testa", "eng"),
    ],
)
def test_a_files_language(path, language):
    assert files.language_of(path) == language
    assert files.named(f"sw={path}") == ("sw", path)
    assert files.named(path) == (None, path)


def test_universal_ner():
    if not UNER.is_dir():
        pytest.skip(f"the Universal NER files are not here ({UNER})")
    expected = {"en_ewt-ud-dev": (2001, 25149, 0, 0), "sr_set-ud-dev": (536, 11993, 2, 0)}
    expected |= {"da_ddt-ud-test": (565, 10023, 1, 0), "sv_talbanken-ud-test": (1219, 20377, 0, 46)}
    found = files.read([UNER / f"{name}.tsv" for name in expected], "tokens")
    assert [(r.rows, r.words, r.repaired, r.odd) for r in found.reports] == list(expected.values())
    assert sum(word.startswith("#") for words in found.dataset["words"] for word in words) == 5
    assert "entities of type OTH are in sr alone" in found.notes()

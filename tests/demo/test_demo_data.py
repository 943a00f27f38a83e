"""The demo's archives and corpora, without a network."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile

import demo_cases
import pytest

from fastdistil.demo import corpora, fetch

# ---- archives


def archive_of(data, name="tiny-1.0.tar.gz"):
    return fetch.Archive("tiny==1.0", name, len(data), hashlib.sha256(data).hexdigest())


def pip_that_brings(monkeypatch, data):
    def download(archive, folder):
        (folder / archive.filename).write_bytes(data)

    monkeypatch.setattr(fetch, "_pip_download", download)


def test_fetch_verifies_then_keeps(tmp_path, monkeypatch):
    archive = archive_of(b"good")
    pip_that_brings(monkeypatch, b"good")
    assert fetch.fetch(archive, tmp_path).read_bytes() == b"good"
    pip_that_brings(monkeypatch, b"changed")  # must not be asked again
    assert fetch.fetch(archive, tmp_path).read_bytes() == b"good"
    assert [p.name for p in tmp_path.iterdir()] == [archive.filename]


@pytest.mark.parametrize(
    ("brought", "reason"), [(b"goo", "truncated, has 3 bytes"), (b"bad!", "wrong hash"), (b"goodbye", "too long")]
)
def test_fetch_refuses_and_leaves_nothing(tmp_path, monkeypatch, brought, reason):
    pip_that_brings(monkeypatch, brought)
    with pytest.raises(ValueError, match=rf"tiny-1\.0\.tar\.gz: {reason}"):
        fetch.fetch(archive_of(b"good"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tiny-1.0.tar.gz").write_bytes(brought)  # spoilt in the cache
    with pytest.raises(ValueError, match=reason + r".*delete it to fetch it again"):
        fetch.fetch(archive_of(b"good"), tmp_path)


def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def download(archive, folder):
        (folder / archive.filename).write_bytes(b"go")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_pip_download", download)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(archive_of(b"good"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_failure_names_file_and_reason(tmp_path, monkeypatch):
    def fail(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(
        RuntimeError, match=r"tiny-1\.0\.tar\.gz: pip could not download tiny==1\.0: ERROR: no such host"
    ):
        fetch.fetch(archive_of(b"good"), tmp_path)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere: missing, expected the archive of tiny==1\.0"):
        fetch.verify(fetch.Path("nowhere"), archive_of(b""))


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDISTIL_CACHE", str(tmp_path / "named"))
    assert fetch.cache_dir() == tmp_path / "named"
    assert fetch.cache_dir(tmp_path) == tmp_path
    monkeypatch.delenv("FASTDISTIL_CACHE")
    assert "fastdistil" in fetch.cache_dir().parts


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)


@pytest.mark.parametrize(("make", "name"), [(make_tar, "a.tar.gz"), (make_zip, "a.whl")])
def test_members(tmp_path, make, name):
    make(tmp_path / name, {"p/b.txt": b"2", "p/a.txt": b"1" * 5000, "p/c.py": b"no"})
    assert fetch.read_members(tmp_path / name, [".txt"]) == {"p/a.txt": b"1" * 5000, "p/b.txt": b"2"}
    with pytest.raises(ValueError, match=rf"{name}: holds no member that ends in '\.md'"):
        fetch.read_members(tmp_path / name, [".txt", ".md"])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as an archive"):
        fetch.read_members(tmp_path / name, [".txt"])


# ---- corpora

CONLLU = """# sent_id = tr-blog:1:S049
1\tBakara\tbakara\tNOUN\tNNP\t_\t2\tnn\t_\t_
2\timkan\timkan\tNOUN\tNN\t_\t3\tig\t_\tSpaceAfter=No
3\tsız\t_\tVERB\tNOMP\t_\t0\troot\t_\t_
4\tve\tve\tCONJ\tCC\t_\t1\tcc\t_\t_
5\thop\thop\tONOM\tDUP\t_\t1\tx\t_\tSpaceAfter=No
6\t.\t.\tPUNCT\t.\t_\t1\tp\t_\t_

# sent_id = tr-blog:1:S050
1\tKısa\tkısa\tADJ\tJJ\t_\t0\troot\t_\t_
"""


def tagged(sentence):
    return [(w, s, corpora.TAGS[t]) for w, s, t in zip(sentence.words, sentence.spaces, sentence.tags, strict=True)]


def test_turkish_merges_groups():
    (sentence,) = corpora.turkish(CONLLU)  # the second one is too short
    assert tagged(sentence) == [
        ("Bakara", True, "NAME"), ("imkansız", True, "VERB"), ("ve", True, "CONJ"), ("hop", True, "X"), (".", False, "PUNCT"),
    ]  # fmt: skip


def test_turkish_splits_by_document():
    text = "\n".join(CONLLU.replace("tr-blog:1:", f"tr-blog:{i // 3}:") for i in range(60))
    held_out = [s.held_out for s in corpora.turkish(text)]
    assert 0 < sum(held_out) < 60
    assert all(len(set(held_out[i : i + 3])) == 1 for i in range(0, 60, 3))


def test_chinese_cuts_sentences_and_holds_the_end_out():
    lines = ["中国/ns  人民/n  很/d  好/a  。/w  他/r  在/p  这里/r  工作/v  。/w  短/a"] * 20
    found = list(corpora.chinese("\n".join(lines)))
    assert len(found) == 40
    assert tagged(found[0]) == [
        ("中国", True, "NAME"), ("人民", False, "NOUN"), ("很", False, "ADV"), ("好", False, "ADJ"), ("。", False, "PUNCT"),
    ]  # fmt: skip
    assert [s.held_out for s in found] == [False] * 36 + [True] * 4


def test_greek_strips_marks():
    text = "020101 N- ----NSF- x Ἀρχὴ Ἀρχὴ ἀρχή ἀρχή\n020101 RA ----GSN- x τοῦ τοῦ τοῦ ὁ\n"
    text += "020101 N- ----GSM- x ⸀Ἰησοῦ, Ἰησοῦ Ἰησοῦ Ἰησοῦς\n020102 C- - x καὶ καὶ καί καί\n"
    (sentence,) = corpora.greek(text, True)  # the second verse is too short
    assert tagged(sentence) == [
        ("Αρχη", True, "NOUN"), ("του", True, "DET"), ("Ιησου", True, "NAME"), (",", False, "PUNCT"),
    ]  # fmt: skip
    assert sentence.held_out


def test_sample_is_disjoint_and_repeats():
    drawn = corpora.sample(demo_cases.corpus("Greek"), labelled=5, unlabelled=10, test=6, seed=3)
    assert (len(drawn.labelled), len(drawn.unlabelled), len(drawn.test)) == (5, 10, 6)
    ids = [id(s) for s in drawn.labelled + drawn.unlabelled]
    assert len(set(ids)) == 15
    assert all(s.held_out for s in drawn.test) and not any(s.held_out for s in drawn.labelled + drawn.unlabelled)
    assert drawn == corpora.sample(demo_cases.corpus("Greek"), labelled=5, unlabelled=10, test=6, seed=3)
    assert drawn != corpora.sample(demo_cases.corpus("Greek"), labelled=5, unlabelled=10, test=6, seed=4)
    with pytest.raises(ValueError, match=r"sample: Greek has 40 \+ 12 sentences, wanted 15 \+ 20"):
        corpora.sample(demo_cases.corpus("Greek"), labelled=5, unlabelled=10, test=20, seed=0)


def test_unknown_language():
    with pytest.raises(ValueError, match="load: language is 'Latin'"):
        corpora.load("Latin")

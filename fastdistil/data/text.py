"""Raw text of several languages, cut into pieces once and kept on disk.

    corpora = tokenise(["fr=wiki.txt", "sw.jsonl"], tokenizer, Path("runs/light/text"))

| a text is | its documents |
|---|---|
| a file of text (.txt and whatever has no other meaning, also .gz, .xz, .bz2, .zst) | its lines, or its paragraphs |
| JSON Lines (.jsonl, .json), CSV (.csv, .tsv), Parquet (.parquet), Arrow (.arrow) | column `text`, or its only text |
| a folder of `Dataset.save_to_disk` | the same; the split "train" where there are several |
| another name | a dataset of the hub, NAME or NAME:CONFIGURATION, its split "train" |

`fr=FILE` names the language; else it is the file's name up to its first dot. Files of one language are joined.

What is kept are Arrow files of 20,000 documents each, so that an interrupted call continues behind the last one. Pieces
never lie in memory: what is read is mapped from the files.

A special token that was typed in the text ("[SEP]") is text like any other; where the model's own vocabulary holds it
all the same (Unigram: "</s>"), it becomes the unknown piece. Nothing in a document can end it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fastdistil.data.corruption import special_ids
from fastdistil.data.tables import quiet

PART = 20_000  # documents in a file
_KINDS = {
    "jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow", "txt": "text",
}  # fmt: skip
_PACKED = (".gz", ".xz", ".bz2", ".zst", ".lz4", ".zip")
_INFO = "corpus.json"

Ids = NDArray[np.int32]


def sources(texts: Sequence[str | os.PathLike[str]]) -> dict[str, list[str]]:
    """{language: files or names} in the order given, from `fr=FILE` or FILE. Raises ValueError for an empty list."""
    found: dict[str, list[str]] = {}
    if isinstance(texts, (str, os.PathLike)):
        raise TypeError(f"text: is {type(texts).__name__}, expected a list of files ([{str(texts)!r}] for one)")
    for text in map(str, texts):
        language, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            language, path = Path(text.partition(":")[0]).name.partition(".")[0], text
        if not language or not path:
            raise ValueError(f"text: {text!r} names no language or no file, expected LANGUAGE=FILE or FILE")
        found.setdefault(language, []).append(path)
    if not found:
        raise ValueError("text: there is none, expected LANGUAGE=FILE or FILE at least once")
    return found


def _kind(path: str) -> str | None:
    """The loader of `datasets` that a file's name asks for, or None."""
    name = path.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return _KINDS.get(name.rpartition(".")[2]) if "." in Path(name).name else None


def read(text: str, *, documents: str = "line", column: str | None = None, cache: Path | None = None) -> Any:
    """A datasets.Dataset with the one column `text` from a file, a saved dataset or a name on the hub.

    `documents` of text files: "line" or "paragraph" (an empty line between). `cache` is the folder of what `datasets`
    makes of files. Raises FileNotFoundError for a file that is missing, ValueError where the column is not clear.
    """
    if documents not in ("line", "paragraph"):
        raise ValueError(f"text: documents is {documents!r}, expected 'line' or 'paragraph'")
    with quiet():
        return _text_column(_load(text, documents, cache), text, column)


def _load(text: str, documents: str, cache: Path | None) -> Any:
    path, kind = Path(text), _kind(text)
    if path.is_dir():
        found = datasets.load_from_disk(text)
    elif path.exists():
        options: dict[str, Any] = {"sample_by": documents} if kind in (None, "text") else {}
        options |= {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
        folder = None if cache is None else str(cache)
        found = datasets.load_dataset(kind or "text", data_files=[text], cache_dir=folder, **options)
    elif kind is not None or path.is_absolute() or text.startswith("."):
        raise FileNotFoundError(f"text: {text} is no file or folder")
    else:
        name, _, configuration = text.partition(":")
        found = datasets.load_dataset(name, configuration or None)
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise ValueError(f"text: {text} has the splits {sorted(found)}, expected train")
        found = found["train"]
    return found


def _text_column(found: Any, text: str, column: str | None) -> Any:
    strings = [
        name for name, kind in found.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if column is None:
        column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column not in strings:
        raise ValueError(
            f"text: {text} has the columns {found.column_names}, of which {strings} hold strings: column is "
            f"{column!r}, expected one of these"
        )
    return found.select_columns([column]).rename_columns({} if column == "text" else {column: "text"})


def _state(path: str) -> Any:
    """What changes with a file's or a folder's content."""
    files = [Path(path)] if Path(path).is_file() else sorted(x for x in Path(path).rglob("*") if x.is_file())
    return [path, *((str(x.resolve()), x.stat().st_size, x.stat().st_mtime_ns) for x in files)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a fast tokenizer of transformers does: its pieces, their order, and its rules."""
    return _hash([tokenizer.backend_tokenizer.to_str(), sorted(special_ids(tokenizer))])


def _cutter(tokenizer: Any, words: bool) -> Callable[[Mapping[str, list[str | None]]], dict[str, list[Any]]]:
    """A function for Dataset.map: texts to pieces, without special tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "[SEP]" in a text is text
    unknown = tokenizer.unk_token_id
    forbidden = np.array(sorted(special_ids(tokenizer) - {unknown}))

    def cut(batch: Mapping[str, list[str | None]]) -> dict[str, list[Any]]:
        texts = [text for text in batch["text"] if text and not text.isspace()]
        found: dict[str, list[Any]] = {"ids": [], "key": []} | ({"inside": []} if words else {})
        for text, encoding in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            keep = np.ones(len(ids), bool)
            typed = np.isin(ids, forbidden)
            if unknown is None:
                keep = ~typed
            else:
                ids[typed] = unknown
            if not keep.any():
                continue
            found["ids"].append(ids[keep])
            found["key"].append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True))
            if words:
                numbers = np.array([-1 if word is None else word for word in encoding.word_ids])[keep]
                found["inside"].append(np.diff(numbers, prepend=-2) == 0)
        return found

    return cut


class Corpus:
    """One language's documents in pieces, mapped from the files that `tokenise` wrote.

    `lengths` (documents,) int64, `keys` (documents,) int64, a hash of each text. Of 10 million documents both take 160
    MB; pieces stay on disk. `unknown` is the number of unknown pieces.
    """

    def __init__(self, language: str, folder: Path) -> None:
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        self.language, self.unknown = language, int(info["unknown"])
        self.sources: list[str] = info["sources"]
        tables = [datasets.Dataset.from_file(str(folder / name)).data for name in info["files"]]
        chunks = {
            name: [chunk for table in tables for chunk in table.column(name).chunks]
            for name in (tables[0].column_names if tables else ["ids", "key"])
        }
        self._flat: dict[str, list[Any]] = {"ids": [x.flatten().to_numpy() for x in chunks["ids"]]}
        if "inside" in chunks:  # bits are unpacked when read: a bool has no view
            self._flat["inside"] = [x.flatten() for x in chunks["inside"]]
        lengths = [x.value_lengths().to_numpy() for x in chunks["ids"]]
        self.lengths: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        self.keys: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *(x.to_numpy() for x in chunks["key"])])
        self._first = np.cumsum([0, *map(len, lengths)])  # document that begins each chunk
        begins = [np.cumsum(x, dtype=np.int64) - x for x in lengths]  # within the chunk
        self._begin: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *begins])

    @property
    def has_words(self) -> bool:
        """Whether it is known which pieces continue a word."""
        return "inside" in self._flat

    @property
    def pieces(self) -> int:
        return int(self.lengths.sum())

    def document(self, number: int, name: str = "ids", first: int = 0, last: int | None = None) -> NDArray[Any]:
        """Pieces `first` to `last` of a document, int32, or with name "inside" whether each continues a word, bool."""
        chunk = int(np.searchsorted(self._first, number, side="right")) - 1
        begin = int(self._begin[number])
        end = int(self.lengths[number]) if last is None else min(last, int(self.lengths[number]))
        part = self._flat[name][chunk][begin + first : begin + end]
        found: NDArray[Any] = part if name == "ids" else part.to_numpy(zero_copy_only=False)
        return found

    def counts(self, size: int) -> NDArray[np.int64]:
        """How often each of the ids 0 to `size` - 1 stands in the documents, (size,) int64."""
        total = np.zeros(size, np.int64)
        for flat in self._flat["ids"]:
            total += np.bincount(flat, minlength=size)
        return total

    def held_out(self, share: float, seed: int) -> NDArray[np.bool_]:
        """Which documents are held out, (documents,): a `share` of them, drawn by `seed` and each document's text, so
        that equal documents are on one side. At least one where `share` is above 0.

        Raises ValueError where none is left to train on.
        """
        if not 0 <= share < 1:
            raise ValueError(f"text: held_out is {share}, expected at least 0 and less than 1")
        if share == 0:
            return np.zeros(len(self.keys), bool)
        salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())
        drawn = _mixed(self.keys.view(np.uint64) ^ np.uint64(salt))
        count = max(1, round(share * len(drawn)))
        held: NDArray[np.bool_] = drawn <= np.partition(drawn, count - 1)[count - 1]
        if held.all():
            raise ValueError(
                f"text: {self.language} has {len(held)} documents that differ, of which {share} are held out: none is "
                "left to train on; expected more documents (lines, by default), or held_out = 0"
            )
        return held

    def fingerprint(self) -> dict[str, Any]:
        looks = self.keys[np.linspace(0, len(self.keys) - 1, 64).astype(int)].tolist()
        return {"documents": len(self.keys), "pieces": self.pieces, "keys": _hash(looks)}


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's last steps: a draw of 64 bits from a key."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def tokenise(
    texts: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    cache: Path,
    *,
    documents: str = "line",
    column: str | None = None,
    words: bool = False,
) -> list[Corpus]:
    """Cut each language's documents into the pieces of a fast `tokenizer`, once; later calls map what lies in `cache`.

    `documents` and `column` as `read`; blank documents are left out. `words` keeps which pieces continue a word, for
    `Corruption(whole_words=True)`. A file that has changed, or another tokenizer, is cut anew.

    Raises ValueError where a language has no text, and for `words` where the tokenizer cuts no text into words; else as
    `sources` and `read`.
    """
    if words:
        _check_words(tokenizer)
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    for language, paths in sources(texts).items():
        asked = [[_state(path) for path in paths], tokenizer_hash(tokenizer), documents, column, words]
        folder = cache / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in language)}-{_hash(asked)}"
        if not (folder / _INFO).exists():
            _cut_all(language, paths, tokenizer, folder, cache / "raw", documents, column, words)
        corpus = Corpus(language, folder)
        if corpus.pieces == 0:
            raise ValueError(f"text: {language} has no text ({', '.join(paths)})")
        found.append(corpus)
    return found


def _cut_all(
    language: str,
    paths: list[str],
    tokenizer: Any,
    folder: Path,
    raw: Path,
    documents: str,
    column: str | None,
    words: bool,
) -> None:
    read_in = [read(path, documents=documents, column=column, cache=raw) for path in paths]
    whole = datasets.concatenate_datasets(read_in) if len(read_in) > 1 else read_in[0]
    lists = {"ids": datasets.Sequence(datasets.Value("int32"))}
    lists |= {"inside": datasets.Sequence(datasets.Value("bool"))} if words else {}
    features = datasets.Features({**lists, "key": datasets.Value("int64")})
    cut, unknown, files = _cutter(tokenizer, words), 0, list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(whole), desc=f"cutting {language}", unit="doc", disable=None, leave=False) as bar, quiet():
        for first in range(0, len(whole), PART):
            part = whole.select(range(first, min(first + PART, len(whole))))
            path = folder / f"part-{first // PART:06d}.arrow"
            done = part.map(
                cut, batched=True, remove_columns=part.column_names, features=features,
                cache_file_name=str(path), load_from_cache_file=True, new_fingerprint=f"{folder.name}-{first}",
            )  # fmt: skip
            if len(done):
                files.append(path.name)
                counted = (x.flatten().to_numpy() for x in done.data.column("ids").chunks)
                unknown += sum(int((ids == tokenizer.unk_token_id).sum()) for ids in counted)
            bar.update(len(part))
    for left in folder.glob("tmp*"):  # of a call that was killed
        left.unlink()
    partial = folder / f"{_INFO}.partial"
    partial.write_text(json.dumps({"files": files, "unknown": unknown, "sources": paths}) + "\n", encoding="utf-8")
    os.replace(partial, folder / _INFO)


def _check_words(tokenizer: Any) -> None:
    encoding = tokenizer.backend_tokenizer.encode("one two three", add_special_tokens=False)
    if len(set(encoding.word_ids)) < 3:
        raise ValueError(
            f"text: words is True, but the {type(tokenizer).__name__} does not cut a text into words before it cuts "
            "these into pieces: whole words would be whole documents; expected False"
        )

"""The student's model card: where it comes from, how it scores, and under which licences its sources stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistil.configs.common import to_yaml
from fastdistil.systems.folder import write_text

UNKNOWN = "not stated"


def licence_of(model: str) -> str:
    """The licence that a model's own card names; "not stated" where there is no card at hand or it names none.

    Of a hub name the card is asked for only in the local cache: nothing is fetched.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = Path(model) / "README.md"
    if not Path(model).is_dir():
        cached = try_to_load_from_cache(model, "README.md")
        if not isinstance(cached, str):
            return UNKNOWN
        path = Path(cached)
    if not path.is_file():
        return UNKNOWN
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except ValueError:  # a card without metadata, or with broken ones
        return UNKNOWN
    return str(found) if found else UNKNOWN


def write(
    folder: Path,
    *,
    system: str,
    teacher: str,
    data_licence: str | None,
    paper: str,
    languages: Sequence[str] = (),
    pipeline: str | None = None,
    scores: Sequence[Sequence[str]] = (),
    configuration: Mapping[str, Any],
) -> None:
    """Write README.md beside a saved model. `scores` is a table of header and rows, `pipeline` transformers' task name.

    A licence that nobody stated is said to be so; the student's own licence is left to its user.
    """
    from huggingface_hub import ModelCardData

    from fastdistil.systems.report import markdown_table

    named = [x for x in languages if len(x) in (2, 3) and x.isascii() and x.isalpha()]
    local = Path(teacher).exists()
    data = ModelCardData(
        language=named or None,
        base_model=None if local else teacher,
        pipeline_tag=pipeline,
        library_name="transformers",
        tags=["knowledge-distillation", "fastdistil"],
    )
    name = Path(teacher).name if local else teacher
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.parent.name}",
        f"Distilled from {name} by fastdistil, recipe {system} ({paper}).",
        f"Licence of the teacher: {licence_of(teacher)}. Licence of the data: {data_licence or UNKNOWN}. Both bind "
        "what is done with this model.",
        *([markdown_table(scores)] if scores else []),
        f"```yaml\n{to_yaml(configuration)}```",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")

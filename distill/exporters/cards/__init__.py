"""The card of an export: README.md, from the front matter that the hub reads to what was proved in which engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import printable
from distill.exporters.cards import licence as licences
from distill.exporters.cards.engines import proved, use
from distill.exporters.cards.results import results
from distill.exporters.cards.student import limits, made, what_it_is
from distill.exporters.local_paths import is_local, name_of
from distill.yaml_file import dump

if TYPE_CHECKING:
    from distill.exporters.proofs import Proof
    from distill.exporters.source import Source
    from distill.exporters.target import Form, Target
    from distill.runs.run_dir import RunDir


@dataclass(frozen=True)
class Facts:
    """What a card is made from. written: the export under its scratch name. proofs: None where nothing was to be proved."""

    student: Path
    run: "RunDir | None"
    source: "Source"
    kind: str
    target: "Target"
    form: "Form"
    proofs: "list[Proof] | None"
    written: Path


def card(facts: Facts, name: str) -> str:
    """The text of README.md.

    Args:
        name: what whoever reads it calls the export: a folder, or a repository of the hub.

    Raises:
        UserError: a file of the run is damaged.
    """
    reference = _reference(facts)
    found = licences.of_teacher(reference)
    sections = [
        f"# {name.rstrip('/').rpartition('/')[2]}",
        what_it_is(facts, name_of(reference)),
        "## Use",
        use(facts, name),
        "## Proved",
        proved(facts),
        "## Teacher and licence",
        licences.said(found, name_of(reference)),
        "## How it was made",
        made(facts),
        results(facts.run),
        "## Limits",
        limits(facts),
    ]
    return printable("\n\n".join([_front(facts, reference, found), *sections])) + "\n"


def _reference(facts: Facts) -> str:
    """The teacher, as the recipe names it or the student remembers it."""
    if facts.run is not None:
        return facts.run.recipe().teacher
    teacher = facts.source.config.distill.get("teacher") or {}
    return teacher.get("reference") or "a teacher that its config does not name"


def _front(facts: Facts, reference: str, found: licences.Licence) -> str:
    """The YAML that the hub reads."""
    entries: dict = {"license": found.id}
    if found.name:
        entries["license_name"] = found.name
    if found.link:
        entries["license_link"] = found.link
    base = found.base or (reference if reference.count("/") == 1 and not is_local(reference) else None)
    if base:
        entries |= {"base_model": base, "base_model_relation": "finetune"}
    files = {file.suffix for file in facts.written.iterdir()}
    entries["library_name"] = "gguf" if ".gguf" in files and ".safetensors" not in files else "transformers"
    entries["pipeline_tag"] = "text-generation"
    kinds = sorted(kind.replace("_", "-") for kind in facts.source.kinds)
    entries["tags"] = ["distill", "hybrid", "state-space-model", *kinds]
    if ".gguf" in files:
        entries["tags"].append("gguf")
    return f"---\n{dump(entries, sort_keys=False).strip()}\n---"

"""The model card of an export (README.md): front matter for the hub, use, proofs, licence, training, results, limits."""

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
from teachers.source import HUB_ID

if TYPE_CHECKING:
    from distill.exporters.proofs import Proof
    from distill.exporters.source import Source
    from distill.exporters.target import Form, Target
    from distill.runs.run_dir import RunDir


@dataclass(frozen=True)
class Facts:
    """The facts that a card states. written: the export's temporary folder. proofs: None if proofs were skipped."""

    student: Path
    run: "RunDir | None"
    source: "Source"
    kind: str
    target: "Target"
    form: "Form"
    proofs: "list[Proof] | None"
    written: Path


def card(facts: Facts, name: str, hub: bool = False) -> str:
    """The text of README.md.

    Args:
        name: the export's name in the card's commands: a folder, or a repository on the hub if `hub` is true.

    Raises:
        UserError: a file of the run is damaged.
    """
    reference = _reference(facts)
    found = licences.of_teacher(reference)
    sections = [
        f"# {facts.run.recipe().name if facts.run else name.rstrip('/').rpartition('/')[2]}, {facts.kind}",
        what_it_is(facts, name_of(reference)),
        "## Use",
        use(facts, name, hub),
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
    """Return the teacher's reference from the recipe, or from the student's config outside a run."""
    if facts.run is not None:
        return facts.run.recipe().teacher
    teacher = facts.source.config.distill.get("teacher") or {}
    return teacher.get("reference") or "a teacher that its config does not name"


def _front(facts: Facts, reference: str, found: licences.Licence) -> str:
    """Return the YAML front matter that the hub reads."""
    entries: dict = {"license": found.id}
    if found.name:
        entries["license_name"] = found.name
    if found.link:
        entries["license_link"] = found.link
    on_hub = reference.count("/") == 1 and HUB_ID.fullmatch(reference) and not is_local(reference)
    base = found.base or (reference if on_hub else None)
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

"""Proofs of an export: every engine that runs it is compared with the student, before the export gets its final name.

Every engine runs in a fresh process, by a script that imports nothing of this project. A proof has three steps:

  1. transformers runs the export in float32, before rounding. It is compared with the student, which this project loads in
     float32. So the rewrite itself is seen to be exact.
  2. The published folder is compared tensor by tensor with that export, rounded. transformers runs it as well, to measure
     the cost of rounding.
  3. Every other engine runs the published folder, and is compared with transformers' float32 run of it.

The bounds are in `bounds.py`.

To add an engine: add its name to `exporters/engines.py`, write a script next to this file that answers a job as `answer.py`
reads it, and add a line to `proof.SCRIPTS`, to `installed.MODULES` and to `bounds.BOUNDS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.exporters.engines import ENGINES
from distill.exporters.proofs.proof import SCRIPTS, Proof

if TYPE_CHECKING:
    from distill.exporters.proofs.asked import Reading
    from distill.exporters.source import Source
    from distill.exporters.target import Form, Target

__all__ = ["SCRIPTS", "Proof", "prove"]


def prove(
    student: Path,
    written: Path,
    target: "Target",
    source: "Source",
    form: "Form",
    *,
    pythons: Mapping[str, str],
    say: Callable[[str], None],
    reading: "Reading | None" = None,
) -> list[Proof]:
    """Run an export in every installed engine that runs it, each in a fresh process, and compare it with the student.

    Args:
        student: the finished student's folder. written: the export's temporary folder.
        pythons: Python interpreters of engines with their own environment, by engine; see `exporters.engines.pythons`.
        say: called with each line of progress. reading: how much text and how many tokens (default: `asked.Reading()`).

    Returns:
        one proof for each engine, in the order of ENGINES.

    Raises:
        UserError: the first difference found, with the engine and both values; an engine that cannot hold the export in
            memory; a Python of `pythons` that does not start or lacks the engine.
    """
    from distill.exporters.proofs.chain import Chain
    from distill.exporters.proofs.installed import installed, too_old

    reasons, proofs, found = target.engines(source), {}, {}
    for engine in ENGINES:
        if why := reasons.get(engine):
            proofs[engine] = Proof(engine, "cannot", why)
        elif where := installed(engine, pythons):
            if why := too_old(engine, where.version, target.since(source)):
                proofs[engine] = Proof(engine, "cannot", why, where.version)
            else:
                found[engine] = where
        else:
            proofs[engine] = Proof(engine, "absent", "not installed")
    if found:
        with Chain.of(student.absolute(), written.absolute(), target, source, form, reading, found, say) as chain:
            proofs |= chain.proofs()
    return [proofs[engine] for engine in ENGINES]

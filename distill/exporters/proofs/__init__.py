"""What was seen of an export in the engines that are to run it, before it takes its final name.

Every engine runs in a fresh process, by a script that needs nothing of this project. The student, loaded by this project
in float32, is what transformers is held against: before rounding, so that the rewrite itself is seen to be exact. The
published folder is then that rewrite, rounded, tensor by tensor, and what rounding costs is a number. Every other engine is
held against transformers' float32 run of the published folder. Bounds stand in `bounds.py`.

To add an engine: its name in `exporters/engines.py`, a script beside this file that answers a job as `answer.py` reads it,
and its line in `proof.SCRIPTS`, in `installed.MODULES` and in `bounds.BOUNDS`.
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
    """Run an export in every engine that is to run it and is installed, each in a fresh process, against the student.

    Args:
        student: the finished student's folder. written: the export, under its scratch name.
        pythons: engines that live in an environment of their own, with its Python; see `exporters.engines.pythons`.
        say: told what is being proved. reading: how much text and how many tokens (default: `asked.Reading()`).

    Returns:
        one of each engine, in the order of ENGINES.

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

"""The model card's sections on the student: what it is, how it was made, and its limits."""

import json
from typing import TYPE_CHECKING

from distill.stages import stages_of
from teachers.files import stored_tensors

if TYPE_CHECKING:
    from distill.exporters.cards import Facts

KEPT = "the teacher's attention"


def what_it_is(facts: "Facts", teacher: str) -> str:
    """Describe the student in two sentences, its form, and its layout letter by letter."""
    layout = facts.source.layout
    pattern = "".join(layout.pattern)
    kept = len(facts.source.kept)
    stored = stored_tensors(str(facts.student))
    size = f", {sum(tensor.size for tensor in stored.values()) / 1e6:,.1f} M parameters" if stored else ""
    keep = "keeps" if kept == 1 else "keep"
    lines = [
        f"A hybrid distilled from `{teacher}`: of its {len(pattern)} layers, {len(pattern) - kept} have a "
        f"{' or '.join(sorted(facts.source.kinds)) or 'mixer'} in place of attention and {kept} {keep} attention{size}. "
        "Only the caches of the layers that keep attention grow with the text.",
        f"Form: {facts.kind}, {facts.target.types(facts.form)}"
        + ". "
        + f"{facts.target.line[0].upper()}{facts.target.line[1:]}.",
        f"```\n{pattern}\n```",
    ]
    for letter in dict.fromkeys(pattern):
        options = layout.mixers.get(letter)
        said = KEPT if options is None else f"`{json.dumps(options, sort_keys=True)}`"
        lines.append(f"- `{letter}`, {pattern.count(letter)} of {len(pattern)} layers: {said}")
    if layout.meta_tokens:
        lines.append(f"- {layout.meta_tokens} learned meta tokens in front of every text")
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:])


def made(facts: "Facts") -> str:
    """Describe the recipe: stages, tokens and lengths."""
    if facts.run is None:
        return "The recipe is not known: the student was exported without its run folder."
    from distill.reports.tables import markdown

    recipe = facts.run.laid_out()
    entries = stages_of(recipe)
    lines = [[entry.name, f"{entry.options.tokens:,}"] for entry in entries]
    total = sum(entry.options.tokens for entry in entries)
    lines.append(["total", f"{total:,}"])
    length = f"Training windows of {recipe.data.seq_len:,} tokens, {recipe.data.batch} a step, seed {recipe.seed}."
    return "\n\n".join([f"Recipe `{recipe.name}` ({recipe.fingerprint}).", markdown(["stage", "tokens"], lines), length])


def limits(facts: "Facts") -> str:
    """List what to know before serving the student."""
    lines = [
        "Leave prefix caching off unless your engine documents it for the states of hybrids: several engines cache only "
        "keys and values, and continue from the state of another text.",
        "Leave speculative decoding off: a recurrent state cannot be rolled back when drafted tokens are rejected.",
        "States are held in float32; a cache in a narrower type drifts over long texts.",
    ]
    if facts.run is not None:
        recipe = facts.run.laid_out()
        longest = max([recipe.data.seq_len, *(getattr(entry.options, "seq_len", None) or 0 for entry in stages_of(recipe))])
        lines.append(
            f"It was trained on windows of {longest:,} tokens. Longer texts are measured only where a table above says so."
        )
    else:
        lines.append("The length of its training windows is not known.")
    if (since := facts.target.since(facts.source)) is not None:
        lines.append(f"Versions of transformers before {since} load it without an error but compute something else.")
    return "\n".join(f"- {line}" for line in lines)

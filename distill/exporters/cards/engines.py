"""Of a card, how each engine is asked to run the export, and what was seen of it there."""

import json
from shlex import quote
from typing import TYPE_CHECKING

from distill.exporters.engines import ENGINES
from distill.runs.run_dir import versions

if TYPE_CHECKING:
    from distill.exporters.cards import Facts
    from distill.exporters.proofs import Proof

TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}{trust})
tokenizer = AutoTokenizer.from_pretrained({name})
print(tokenizer.decode(model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)[0]))
```"""
OTHERS = {
    "vllm": "vllm serve {name}",
    "llama.cpp": 'llama-cli {gguf} -p "Once upon a time" -n 64',
    "mlx": 'mlx_lm.generate{trust} --model {name} --prompt "Once upon a time" --max-tokens 64',
}
VERSIONS = ("distill", "torch", "transformers", "tokenizers", "safetensors")


def use(facts: "Facts", name: str, hub: bool) -> str:
    """The commands of the engines that run it, and why the others do not."""
    reasons = facts.target.engines(facts.source)
    file = next((file.name for file in sorted(facts.written.glob("*.gguf"))), None)
    gguf = f"-hf {quote(name)}" if hub else f"-m {quote(f'{name}/{file}')}"
    parts = []
    for engine in ENGINES:
        if reasons.get(engine) is not None:
            continue
        if engine == "transformers":
            trust = ", trust_remote_code=True" if _brings_code(facts) else ""
            since = facts.target.since(facts.source)
            parts.append(f"transformers{f' (from {since} on)' if since else ''}:")
            parts.append(TRANSFORMERS.format(name=json.dumps(name, ensure_ascii=False), trust=trust))
        elif engine != "llama.cpp" or file:
            trust = " --trust-remote-code" if _names_a_class(facts) else ""
            parts.append(f"{engine}:\n\n```\n{OTHERS[engine].format(name=quote(name), gguf=gguf, trust=trust)}\n```")
    return "\n\n".join(parts) or "No engine runs it as it is."


def proved(facts: "Facts") -> str:
    """What each engine showed, and the versions that this was seen with."""
    reasons, found = facts.target.engines(facts.source), {proof.engine: proof for proof in facts.proofs or []}
    lines = []
    for engine in ENGINES:
        state, more = _state(found.get(engine), reasons.get(engine), facts.proofs is None)
        lines.append([engine, state, more])
    from distill.reports.tables import markdown

    known = versions()
    with_these = ", ".join(f"{name} {known[name]}" for name in VERSIONS if name in known)
    said = (
        "Each engine ran in a process of its own, on real text, against the student that was trained."
        if facts.proofs
        else "Nothing was run against the student that was trained: this export is not verified."
    )
    return "\n\n".join([said, markdown(["engine", "", "what was seen"], lines), f"Written with {with_these}."])


def _state(proof: "Proof | None", reason: str | None, unproved: bool) -> tuple[str, str]:
    """An engine's state in a word, and what goes with it."""
    if reason is not None:
        return "cannot run it", reason
    if unproved:
        return "not verified", "exported with --no-verify"
    if proof is None:
        return "not proved", ""
    if proof.state == "proved":
        numbers = "; ".join(f"{name}: {_number(value)}" for name, value in proof.numbers.items())
        return f"proved with {proof.version.strip('()')}" if proof.version else "proved", numbers
    if proof.state == "absent":
        return "not installed", proof.why or "so it was not proved there"
    return "cannot run it", proof.why


def _number(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _names_a_class(facts: "Facts") -> bool:
    """Whether config.json names a file with the class, which MLX runs where it is allowed to."""
    path = facts.written / "config.json"
    return path.exists() and "model_file" in json.loads(path.read_text())


def _brings_code(facts: "Facts") -> bool:
    return any(facts.written.glob("modeling_*.py"))

"""The model card's sections on engines: the command that runs the export in each, and the result of its proof."""

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
    """Return the command of each engine that runs the export."""
    reasons = facts.target.engines(facts.source)
    file = next((file.name for file in sorted(facts.written.glob("*.gguf"))), None)
    gguf = f"-hf {quote(name)}" if hub else f"-m {quote(f'{name}/{file}')}"
    first, parts = facts.target.preparations(facts.source), []
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
            command = OTHERS[engine].format(name=quote(name), gguf=gguf, trust=trust)
            parts.append(f"{engine}{f' ({first[engine]})' if engine in first else ''}:\n\n```\n{command}\n```")
    return "\n\n".join(parts) or "No engine runs this export."


def proved(facts: "Facts") -> str:
    """Return the table of proofs by engine, and the versions of the packages that wrote the export."""
    reasons, found = facts.target.engines(facts.source), {proof.engine: proof for proof in facts.proofs or []}
    lines = []
    for engine in ENGINES:
        state, more = _state(found.get(engine), reasons.get(engine), facts.proofs is None)
        lines.append([engine, state, more])
    from distill.reports.tables import markdown

    known = versions()
    with_these = ", ".join(f"{name} {known[name]}" for name in VERSIONS if name in known)
    said = (
        "Each engine ran the export on real text in its own process, and was compared with the student that was trained."
        if facts.proofs
        else "This export is not verified: no engine was compared with the student that was trained."
    )
    return "\n\n".join([said, markdown(["engine", "result", "details"], lines), f"Written with {with_these}."])


def _state(proof: "Proof | None", reason: str | None, unproved: bool) -> tuple[str, str]:
    """Return an engine's result in a few words, and its details."""
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
        return "not installed", proof.why or "the export was not proved there"
    return "cannot run it", proof.why


def _number(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _names_a_class(facts: "Facts") -> bool:
    """Whether config.json names a file with the model's class, which MLX runs only with `--trust-remote-code`."""
    path = facts.written / "config.json"
    return path.exists() and "model_file" in json.loads(path.read_text())


def _brings_code(facts: "Facts") -> bool:
    return any(facts.written.glob("modeling_*.py"))

"""README.md of an export: front matter for the hub, and only results that were measured and proved."""

import json
import shutil
from pathlib import Path
from shlex import quote

import pytest
import yaml

import distill
from distill.errors import UserError
from distill.exporters.cards import licence
from distill.exporters.containers.qwen35 import Qwen35
from distill.exporters.proofs import Proof
from tests.distill.random_students import saved, student_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def exported(judged_run, tmp_path, monkeypatch):
    """Export the judged run with a card; the front matter and the rest."""
    monkeypatch.chdir(tmp_path)

    def export(run=judged_run, proofs=None, **options):
        if proofs is not None:
            monkeypatch.setattr("distill.exporters.proofs.prove", lambda *arguments, **more: proofs)
        out = distill.export(run, to="portable", out="my student", verify=proofs is not None, **options)
        _, front, text = (out / "README.md").read_text().split("---\n", 2)
        return yaml.safe_load(front), text

    return export


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_a_judged_student(exported, judged_run, tiny_teacher):
    front, text = exported()
    assert front == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distill", "hybrid", "state-space-model", "discrete-mamba2"],
    }
    assert text.startswith("\n# tiny, portable\n") and "\nAMAM\n" in text and str(tiny_teacher.parent) not in text
    assert "of its 4 layers, 2 have a discrete_mamba2 in place of attention and 2 keep attention" in text
    assert '`M`, 2 of 4 layers: `{"mixer": "discrete_mamba2", "window": {"sinks": 2, "size": 4}}`' in text
    assert 'AutoModelForCausalLM.from_pretrained("my student", trust_remote_code=True)' in section(text, "Use")
    assert "vllm serve" not in text and "llama-cli" not in text
    made = section(text, "How it was made")
    assert "| align | 768 |" in made and "| total | 2,304 |" in made and "windows of 32 tokens, 4 a step, seed 0" in made
    judged = json.loads((judged_run / "evaluations.json").read_text())
    student = judged["final"]["rows"]["student"]["fidelity"]
    fidelity = section(text, "Fidelity")
    assert f"| student | {student['kl']:.3f} ± " in fidelity and "window-only control (twin), trained the same" in fidelity
    assert "ablation: states set to zero" in fidelity and "untrained windows of 64 + 4 in every layer" in fidelity
    assert "suite standard, cpu" in section(text, "Recall") and "recall at 256 tokens" in section(text, "Recall")
    assert "tasks, %" in section(text, "Tasks")
    speed = section(text, "Speed").splitlines()
    assert any(
        line.startswith("| 1 x 32 |") and line.count("\\|") == line.replace("\\|", "").count("|") - 2 for line in speed
    )
    limits = section(text, "Limits")
    assert "prefix caching" in limits and "speculative" in limits and "trained on windows of 32 tokens" in limits


def test_what_an_engine_needs_first(tokenizer, tmp_path):
    """The card and the export's last line name it, in the words of the container; the pages name the same command."""
    student = student_of("qwen3", "MA", {"M": {"mixer": "gated_deltanet"}}, head_dim=8, num_hidden_layers=2)
    lines = []
    console = type("Lines", (), {"print": lambda self, line: lines.append(line)})()
    folder, out = saved(student, tmp_path / "student", tokenizer), tmp_path / "out"
    distill.export(folder, to="native", out=out, verify=False, console=console)
    first = Qwen35.preparations["vllm"]
    use = section((out / "README.md").read_text(), "Use")
    assert f"\nvllm ({first}):\n\n```\nvllm serve {out.name}\n```" in use and use.count(first.command) == 1
    assert lines[-1] == f"  vllm: {first}"
    export, others = ROOT / "docs" / "export.md", ("README.md", "docs/own-checkpoint.md", "docs/instruct.md")
    assert first.reason in export.read_text()
    for page in (export, *(ROOT / name for name in others), ROOT / "distill/exporters/proofs/vllm.py"):
        assert first.command in page.read_text(), page


def test_what_was_not_measured_says_so(untrained_run, exported):
    _, text = exported(untrained_run)
    for title, said in (
        ("Fidelity", "Not measured."),
        ("Recall", "Not measured. `distill eval RUN --suite standard` measures it"),
        ("Tasks", "Not measured. `distill eval RUN --suite quick` measures it"),
        ("Speed", "Not measured. `distill eval RUN --suite standard` measures it"),
    ):
        assert section(text, title).strip().startswith(said)


def test_damaged_results_are_said_before_anything_is_written(judged_run, tmp_path):
    run = shutil.copytree(judged_run, tmp_path / "run")
    whole = json.loads((run / "evaluations.json").read_text())
    for name, said in (("kl", "evaluations.json is damaged"), ("documents", "are inconsistent and cannot be shown")):
        content = json.loads(json.dumps(whole))
        content["final"]["rows"]["student"]["fidelity"][name] = "x" if name == "kl" else None
        (run / "evaluations.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            distill.export(run, verify=False)
    assert not (run / "export").exists()


def test_what_was_proved(untrained_run, exported):
    rows = {
        "proved": ("proved with 5.24.0", "largest difference: 1.2e-05; tokens equal: 200"),
        "absent": ("not installed", "the export was not proved there"),
        "cannot": ("cannot run it", "too wide"),
    }
    for state, (word, more) in rows.items():
        numbers = {"largest difference": 1.2e-5, "tokens equal": 200} if state == "proved" else {}
        why = "too wide" if state == "cannot" else ""
        proof = Proof("transformers", state, why, "5.24.0" if state == "proved" else None, numbers)
        _, text = exported(untrained_run, [proof])
        proved = section(text, "Proved")
        assert f"| transformers | {word} | {more} |" in proved
        assert "| vllm | cannot run it | it does not run code that comes with a model |" in proved
        assert "Each engine ran the export on real text in its own process" in proved and "transformers 5" in proved
        shutil.rmtree("my student")
    _, text = exported(untrained_run)
    assert "| transformers | not verified | exported with --no-verify |" in section(text, "Proved")
    assert "This export is not verified" in section(text, "Proved")


def test_a_failed_proof(untrained_run, tmp_path, monkeypatch):
    """Nothing under the final name, the earlier export as it was, and the difference in the message."""
    out = distill.export(untrained_run, out=tmp_path / "out", verify=False)
    before = (out / "config.json").stat().st_mtime_ns
    seen = {}

    def prove(student, written, target, source, form, *, pythons, say):
        seen.update(written=written, form=form, pythons=pythons, there=sorted(path.name for path in written.iterdir()))
        say("transformers: logits")
        raise UserError("transformers gives 1.0 where the student gives 2.0 (prompt 1, position 7)")

    monkeypatch.setattr("distill.exporters.proofs.prove", prove)
    monkeypatch.setenv("DISTILL_ENGINES", "mlx=sh; vllm=sh;")
    for place in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(UserError) as raised:
            distill.export(untrained_run, out=place, dtype="float32", engines={"vllm": "env"})
        said = str(raised.value)
        assert "position 7" in said and f"nothing was written to {place}" in said
        again = (
            f"distill export {quote(str(untrained_run))} --to portable --dtype float32 --out {quote(str(place))} --no-verify"
        )
        assert f"`{again}` writes it without a proof" in said
    assert seen["pythons"] == {"vllm": "env", "mlx": "sh"} and seen["form"].dtype == "float32"
    assert "config.json" in seen["there"] and seen["written"].parent == tmp_path and not seen["written"].exists()
    assert (out / "config.json").stat().st_mtime_ns == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr("distill.exporters.proofs.prove", lambda *arguments, **more: {}["no such name"])
    with pytest.raises(UserError, match="could not be proved: an internal error"):
        distill.export(untrained_run, out=tmp_path / "new")


# licences


@pytest.mark.parametrize(
    ("card", "config", "wanted", "said"),
    [
        ("---\nlicense: apache-2.0\n---\n", {}, ("apache-2.0", None, None), "keep its notices"),
        ("---\ntags: [a]\nlicense: llama3.2\n---\n", {}, ("llama3.2", None, None), "begin the model's name with `Llama`"),
        ('---\nlicense: "gemma"\n---\n', {}, ("gemma", None, None), "prohibited-use policy"),
        (
            "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n",
            {},
            ("other", "qwen-research", "LICENSE"),
            "read it; this card has no summary of it",
        ),
        ("---\nlicense: my-own\n---\n", {}, ("other", "my-own", None), "read it"),
        ("---\nlicense: [a, b]\n---\n", {}, ("unknown", None, None), "do not state its licence"),
        ("---\nlicense: &a !!python/object:os.system\n---\n", {}, ("unknown", None, None), "do not state"),
        ("license: mit\n", {}, ("unknown", None, None), "look up the teacher's licence"),
        ("", {"license": "cc-by-nc-4.0"}, ("cc-by-nc-4.0", None, None), "no commercial use"),
        (None, {}, ("unknown", None, None), "look up the teacher's licence"),
    ],
)
def test_a_teachers_licence(tiny_teacher, tmp_path, card, config, wanted, said):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    if card is not None:
        (folder / "README.md").write_text(card)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    found = licence.of_teacher(str(folder))
    assert (found.id, found.name, found.link) == wanted
    assert said in " ".join(licence.said(found, "teacher").split())


def test_a_teacher_that_is_gone_or_on_the_hub():
    assert licence.of_teacher("/nowhere/teacher").id == licence.of_teacher("nobody/nothing").id == "unknown"


def test_the_licence_of_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    for name, value, wanted in (("a", "apache-2.0", ("apache-2.0", "owner/model")), ("b", None, ("unknown", "owner/model"))):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if value:
            writer.add_license(value)
        writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/owner/model")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        found = licence.of_teacher(str(tmp_path / f"{name}.gguf"))
        assert (found.id, found.base) == wanted

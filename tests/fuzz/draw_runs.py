"""Run folders: finished, stopped, with a selection, with links."""

from hypothesis import strategies as st

from tests.fuzz.pieces import EVERY, FINISHED, JSON_FILES, LINKS, STOPPED, damaged, kind
from tests.fuzz.world import Case


@kind(5)
def finished_run(draw, trees) -> Case:
    names = [
        "metrics.jsonl",
        "matrices.npz",
        "recipe.yaml",
        "report.html",
        "report.md",
        "student",
        "checkpoints",
        "student/tokenizer.json",
    ]
    names += ["student/model.safetensors", "checkpoints/1-align-end/student.safetensors", *JSON_FILES["finished run"]]
    file = f"@short/{draw(st.sampled_from(names))}"
    return Case("finished run", [draw(st.sampled_from(FINISHED))], [damaged(draw, trees, file)])


@kind(5)
def stopped_run(draw, trees) -> Case:
    newest = "checkpoints/1-align-0000002"
    names = [
        "metrics.jsonl",
        "recipe.yaml",
        "checkpoints",
        newest,
        f"{newest}/rng.safetensors",
        f"{newest}/optimizer.safetensors",
    ]
    names += [f"{newest}/student.safetensors", f"{newest}/stage.safetensors", *JSON_FILES["stopped run"] * 2]
    file = f"@half/{draw(st.sampled_from(names))}"
    return Case("stopped run", [draw(st.sampled_from(STOPPED))], [damaged(draw, trees, file)])


@kind(2)
def selected_run(draw, trees) -> Case:
    names = ["twin", "twin/student", "export", "metrics.jsonl", *JSON_FILES["selected run"]]
    steps = [damaged(draw, trees, f"@every/{draw(st.sampled_from(names))}")]
    if draw(st.booleans()):  # as one that is not over yet
        steps.append({"do": "drop", "file": "@every/run.json", "at": ["finished"]})
    return Case("selected run", [draw(st.sampled_from(EVERY))], steps)


@kind(2)
def links(draw, trees) -> Case:
    """Links where files are written."""
    run = draw(st.sampled_from(["short", "half"]))
    names = [
        ".student",
        "student",
        "matrices.npz",
        "report.html",
        "report.md",
        "metrics.jsonl",
        "run.json",
        "evaluations.json",
        "export",
    ]
    names += ["samples.json", "transfer.json", "checkpoints", "checkpoints/.writing-1-align-0000003", "twin"]
    file = f"@{run}/{draw(st.sampled_from(names))}"
    steps = [{"do": "link", "file": file, "to": draw(st.sampled_from(LINKS))}]
    commands = [["run", f"{run}.yaml"], ["report", f"@{run}"]]
    if draw(st.booleans()):
        steps.append({"do": "delete", "file": f"@{run}/student"})
        steps.append({"do": "drop", "file": f"@{run}/run.json", "at": ["finished"]})
    if draw(st.booleans()):
        commands = [
            [
                "report",
                f"@{run}",
                "--out",
                draw(st.sampled_from(["outside/secret.txt", "short.yaml", "text/train.jsonl", "outside"])),
            ]
        ]
    if draw(st.integers(0, 4)) == 0:
        commands = [["run", f"{run}.yaml", "--fresh"]]
    return Case("links", commands, steps)

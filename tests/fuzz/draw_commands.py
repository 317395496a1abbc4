"""Numbers and names on the command line."""

from hypothesis import strategies as st

from tests.fuzz.pieces import NAMES, kind
from tests.fuzz.values import ESCAPE, strings
from tests.fuzz.world import Case


def _stays(name) -> bool:
    """Whether a folder of this name lies in the place: one elsewhere would be made there, as asked."""
    return isinstance(name, str) and not name.startswith(("/", "~", "-")) and ".." not in name


@kind(4)
def command_line(draw, trees) -> Case:
    number = st.sampled_from(
        ["nan", "inf", "-inf", "-0", "0", "-1", "1e12", "1e400", "0.5", "1000000000000", "", "x", "1e-300", "999999999"]
    )
    small = st.sampled_from(["nan", "inf", "-1", "0", "", "x", "1e400", "99999999999999999999", "3"])
    name = st.sampled_from(NAMES) | strings
    commands = [
        ["generate", "@short", draw(strings), "--tokens", draw(small)],
        ["generate", "@short", "hello", "--tokens", "2", "--temperature", draw(number)],
        [
            "generate",
            "@short",
            draw(st.sampled_from(["a " * 3000, "\udcff", "\udc80abc", "", "\n", ESCAPE]) | strings),
            "--tokens",
            "2",
        ],
        ["run", "text.yaml", "--stop-after", draw(number)],
        ["run", "text.yaml", "--runs", draw(name.filter(_stays))],
        ["select", "text.yaml", "--keep", draw(number)],
        ["select", "text.yaml", "--by", draw(name)],
        [
            "select",
            "text.yaml",
            "--keep",
            "1",
            "--write",
            draw(st.sampled_from(["outside/secret.txt", "text.yaml", "", "outside", "no/where.yaml", "x\n.yaml"])),
        ],
        ["eval", "@short", "--suite", draw(name)],
        ["eval", "@short", "--tasks", draw(name)],
        ["eval", "@short", "--teacher", draw(name)],
        ["eval", "@short", "--heldout", draw(name)],
        ["eval", draw(name)],
        [
            "export",
            "@short",
            "--out",
            draw(
                st.sampled_from(
                    ["outside", "out", "outside/secret.txt", "", ".", "/dev/null/x", "@short", "runs", "teacher"]
                )
            ),
            "--to",
            draw(name | st.just("portable")),
            "--no-verify",
        ],
        [
            "export",
            draw(st.sampled_from(["@short", "@short/student", "out", "teacher", "text"])),
            "--no-verify",
            *(["--out", "written"] if draw(st.booleans()) else []),
            draw(st.sampled_from(["--dtype", "--quantize", "--engine"])),
            draw(name | st.sampled_from(["float32", "bfloat16", "q8_0", "vllm=", "vllm=nowhere", "=x", "a/b/c"])),
        ],
        [
            "report",
            "@short",
            "--out",
            draw(
                st.sampled_from(
                    ["outside/secret.txt", "outside", "teacher/model.safetensors", "", "short.yaml", "no/where.html"]
                )
            ),
        ],
        ["report", draw(name)],
        ["report", "@short", draw(name)],
        ["plan", draw(name)],
        ["run", draw(name)],
        ["plan", "text.yaml", "--json", draw(st.sampled_from(["outside", "", "no/where.json", "outside/secret.txt/x"]))],
        [
            "recipes",
            "show",
            draw(st.sampled_from(["/etc/passwd", "outside/secret.txt", "./outside/secret.txt", "../README"]) | name),
        ],
        ["recipes", "cp", "quickstart", draw(st.sampled_from(["outside/secret.txt", "", "no/where/x.yaml", "short.yaml"]))],
        ["recipes", "cp", draw(name), "copied"],
        ["bench", draw(st.sampled_from(["ops", "layouts", "steps"])), draw(name)],
        ["plan", "text.yaml", draw(strings)],
    ]
    return Case("command line", [draw(st.sampled_from(commands))])


@kind(2)
def names(draw, trees) -> Case:
    """Names of runs, files and folders that are markup, escape bytes or paths."""
    name = draw(st.sampled_from(NAMES) | strings.filter(lambda text: isinstance(text, str) and len(text) < 300))
    how = draw(st.sampled_from(["recipe", "text", "teacher", "run", "label", "mixer", "stage"]))
    recipe = {"do": "set", "file": "text.yaml"}
    if how == "recipe":
        return Case("names", [["run", "text.yaml"]], [recipe | {"at": ["name"], "value": name}])
    if how == "teacher":
        return Case("names", [["plan", "text.yaml"]], [recipe | {"at": ["teacher"], "value": name}])
    if how == "label":
        return Case("names", [["run", "text.yaml"]], [recipe | {"at": ["data", "heldout", 0, "label"], "value": name}])
    if how == "mixer":
        return Case("names", [["plan", "text.yaml"]], [recipe | {"at": ["mixers", "M", "mixer"], "value": name}])
    if how == "stage":
        return Case("names", [["plan", "text.yaml"]], [recipe | {"at": ["stages", 0], "value": {name: {"tokens": 64}}}])
    safe = name.replace("/", "_").replace("\0", "_")[:100] or "_"
    if how == "text":
        steps = [
            {"do": "rename", "file": "text/train.jsonl", "to": f"{safe}.jsonl"},
            recipe | {"at": ["data", "train", 0, "path"], "value": f"text/{safe}.jsonl"},
        ]
        return Case("names", [["run", "text.yaml"]], steps)
    if safe in (".", ".."):
        safe = "..."
    return Case("names", [["report", f"runs/{safe}"]], [{"do": "rename", "file": "@short", "to": safe}])

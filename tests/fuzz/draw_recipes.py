"""Recipes and overrides."""

from hypothesis import strategies as st

from tests.fuzz.pieces import HEAVY, kind, light, node, raw
from tests.fuzz.values import as_json, values
from tests.fuzz.world import Case


@kind(6)
def recipe(draw, trees) -> Case:
    commands = [["plan", "text.yaml"], ["run", "text.yaml", "--stop-after", "0.05"]]
    texts = [
        *(
            "a: &a [*a]",
            "a: &a {b: *a}",
            "<<: {name: x}",
            "name: !!python/object/apply:os.system [touch outside/executed]",
            "- a",
            "a",
            "1",
        ),
        *(
            "name: 010",
            "? [a, b]\n: c",
            "a: b: c",
            "\t",
            "%YAML 3.0\n---\na: 1",
            "--- a\n--- b",
            "name: x\nname: y",
            "{" * 3000,
            "[" * 3000,
        ),
        *(
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 9)}]" for n in range(9)),
            "a: *b",
        ),
    ]
    how = draw(st.integers(0, 9))
    if how == 0:
        steps = [{"do": "write", "file": "text.yaml", "text": draw(st.sampled_from(texts) | st.text(max_size=30))}]
    elif how == 1:
        steps = [raw(draw, "text.yaml")]
    elif how == 2:
        steps = [{"do": "append", "file": "text.yaml", "text": "\n" + draw(st.sampled_from(texts))}]
    else:
        steps = [light(node(draw, trees, "text.yaml"))]
    return Case("recipe", commands, steps, compare=True)


@kind(6)
def override(draw, trees) -> Case:
    keys = [".".join(map(str, at)) for at in trees.nodes("text.yaml") if at]
    keys += [
        "meta_tokens",
        "seed",
        "twin",
        "precision",
        "export",
        "trackers",
        "data.limit",
        "data.micro_batch",
        "data.separator",
        "selected",
    ]
    keys += [
        "evaluation.final_tokens",
        "evaluation.seq_len",
        "mixers.M.d_state",
        "mixers.M.conv",
        "mixers.M.rope",
        "mixers.M.window.size",
    ]
    keys += [
        "mixers.M.window.own",
        "mixers.M.chunk",
        "stages.align.lr.new",
        "stages.align.warmup",
        "stages.align.batch",
        "stages.align.betas",
    ]
    keys += [
        "stages.align.weight_decay",
        "stages.align.clip",
        "stages.1.align.lr",
        "stages.9.lr",
        "checkpoints.minutes",
        "checkpoints.keep",
    ]
    keys += [
        "pattern.by",
        "pattern.keep",
        "mixers.M.mixer",
        "data.train.0.weight",
        "data.train.0.documents",
        "data.train.0.column",
    ]
    key = draw(st.sampled_from(keys))
    written = draw(
        st.sampled_from(
            ["010", "1:30", "0x10", "1_000", "~", ".nan", "-.inf", "[1", "{a: b", "&a [*a]", "*a", "!!python/name:os", "1e3"]
        )
        | values
    )
    value = written if isinstance(written, str) else as_json(written, yaml=True)
    if key.endswith(HEAVY) and value.isdigit() and int(value[:9]) > 4096:
        value = "4096"
    given = f"{key}={value[:3000]}"
    commands = [["plan", "text.yaml", given], ["run", "text.yaml", given, "--stop-after", "0.05"]]
    return Case("override", commands, compare=True)

"""Mistakes in recipes, overrides and the command line itself: each names the value, the key or file, and the fix."""

import pytest

import distill
from distill.errors import UserError

# verb, overrides of tiny.yaml, what the message must hold
KEYS = [
    ("plan", ["teachr=x"], ["tiny.yaml: teachr is not a key here", "did you mean 'teacher'"]),
    ("run", ["data.seqlen=3"], ["data.seqlen is not a key here", "did you mean 'seq_len'"]),
    ("plan", ["data.train.0.pth=x"], ["data.train.0.pth is not a key here", "did you mean 'path'"]),
    ("run", ["stages.align.token=1k"], ["stages.align: token is not a key here", "did you mean 'tokens'"]),
    ("plan", ["mixers.M.rop=true"], ["mixer discrete_mamba2 (M) has no option 'rop'", "did you mean 'rope'"]),
    ("run", ["mixers.M.window.sise=4"], ["discrete_mamba2 has an unknown 'sise'", "did you mean 'size'"]),
    ("plan", ["mixers.M.mixer=mamba3"], ["there is no mixer 'mamba3'", "did you mean 'mamba2'"]),
    ("run", ["stages.0={initialize: {}}"], ["stages.0: there is no stage 'initialize'", "did you mean 'initialise'"]),
    ("plan", ["export=[portabel]"], ["export: there is no target 'portabel'", "did you mean 'portable'"]),
    ("run", ["trackers=[wandbb]"], ["trackers: there is no tracker 'wandbb'", "did you mean 'wandb'"]),
    ("run", ["teacher_4bit=true"], ["teacher_4bit is now teacher_dtype: int8"]),
    (
        "plan",
        ["stages.imitate.offline_logits=x"],
        ["stages.imitate.offline_logits is x", "not a cache of logits", "distill cache"],
    ),
    (
        "run",
        ["stages.imitate.teacher=./gone"],
        ["stages.imitate.teacher: teacher './gone' is no folder here", "give a hub id"],
    ),
    ("cache", ["--top-k", "0"], ["--top-k is 0", "a whole number from 1"]),
    ("cache", ["--stage", "9"], ["--stage is 9", "that can be cached are"]),
]
TYPES = [
    ("plan", ["data.batch=four"], ["data.batch is 'four'", "valid integer"]),
    ("run", ["twin=maybe"], ["twin is 'maybe'", "true or false"]),
    ("plan", ["stages={align: {}}"], ["stages is {'align': {}}", "valid list"]),
    ("run", ["stages=[initialise]"], ["stages.0 is 'initialise'", "valid mapping"]),
    ("plan", ["mixers=[M]"], ["mixers is ['M']", "valid mapping"]),
    ("plan", ["mixers.M=mamba2"], ["mixers.M is 'mamba2'", "valid mapping"]),
    ("run", ["data.train=text.jsonl"], ["data.train is 'text.jsonl'", "valid list"]),
    ("plan", ["teacher=[a]"], ["teacher is ['a']", "valid string"]),
    ("run", ["evaluation.passkey=256"], ["evaluation.passkey is 256", "valid list"]),
    ("plan", ["stages.align.lr=fast"], ["stages.align: lr is 'fast'", "valid number, or it should be a valid mapping"]),
    ("run", ["stages.align.lr={mixers: 1e-3}"], ["stages.align: lr.mixers is 'mixers'", "'new', 'ssm', 'window'"]),
    ("plan", ["stages.align.tokens=lots"], ["stages.align: tokens is 'lots'", "write it like 24000, 24k, 80M"]),
    ("run", ["precision=fp8"], ["precision is 'fp8'", "'float32' or 'bfloat16'"]),
    ("plan", ["device=gpu"], ["device is 'gpu'", "'auto', 'cpu' or 'cuda'"]),
    ("plan", ["mixers.M.d_state=big"], ["d_state is 'big'"]),
]
RANGES = [
    ("plan", ["data.seq_len=2"], ["data.seq_len is 2", "a whole number from 8 to 1,048,576"]),
    ("run", ["data.batch=0"], ["data.batch is 0", "a whole number from 1 to 65,536"]),
    ("plan", ["data.train.0.weight=-1.0"], ["data.train.0.weight is -1.0", "a number from 1e-06 to 1,000,000"]),
    ("plan", ["data.train=[]"], ["data.train is []", "at least 1 item"]),
    ("run", ["stages.align.lr=-1e-3"], ["stages.align: lr is -0.001", "a number above 0 up to 100"]),
    ("plan", ["stages.align.lr=.inf"], ["stages.align: lr is inf", "a number above 0 up to 100"]),
    ("plan", ["stages.align.tokens=0"], ["stages.align: tokens is 0", "a whole number from 1 to 10,000,000,000,000"]),
    ("run", ["stages.align.warmup=0.9"], ["warmup 0.9 and decay 0.2 together exceed the whole stage"]),
    ("plan", ["stages.align.betas=[0.9, 1.5]"], ["stages.align: betas.1 is 1.5", "a number from 0 and below 1"]),
    ("plan", ["stages.imitate.temperature=0"], ["stages.imitate: temperature is 0", "a number from 0.001 to 1,000"]),
    ("plan", ["stages.imitate.ce=2"], ["stages.imitate: ce is 2", "a number from 0 to 1"]),
    ("run", ["checkpoints.keep=0"], ["checkpoints.keep is 0", "a whole number from 1 to 1,000,000"]),
    ("run", ["seed=-1"], ["seed is -1", "a whole number from 0 to 4,294,967,295"]),
    ("plan", ["evaluation.passkey=[5]"], ["evaluation.passkey.0 is 5", "a whole number from 64 to 1,048,576"]),
    ("plan", ["name=../elsewhere"], ["name is '../elsewhere'", "a name that a folder may have"]),
]
LAYOUTS = [
    ("plan", ["pattern=AMMMMM"], ["pattern 'AMMMMM' names 6 layers, but the model has 4"]),
    ("run", ["pattern=AMMMMM"], ["pattern 'AMMMMM' names 6 layers, but the model has 4"]),
    ("plan", ["pattern=AX"], ["pattern uses 'X', but no mixer is given for it", "'A' keeps attention"]),
    ("run", ["mixers.N={mixer: mamba2}"], ["a mixer is given for 'N', but the layout's pattern 'AM' does not use it"]),
    ("plan", ["pattern=''"], ["pattern is empty"]),
    ("run", ["mixers={}", "pattern=A"], ["mixers is empty", "give a mixer for a letter of pattern"]),
    ("plan", ["mixers.m={mixer: mamba2}"], ["mixers.m is 'm'", "one capital letter"]),
    ("plan", ["mixers.M.window.size=0"], ["a window of 0 tokens sees nothing", "at least 1"]),
    ("run", ["mixers.M.window.size=0"], ["a window of 0 tokens sees nothing", "at least 1"]),
    ("plan", ["mixers.M.window.sinks=-1"], ["sinks is -1, which is too small"]),
    ("run", ["mixers.M.window=64"], ["window of mixer discrete_mamba2 is 64", "write it as window: {size: 64}"]),
    ("plan", ["mixers.M={mixer: mamba2, n_groups: 3}"], ["n_groups 3 does not divide the 4 attention heads"]),
    ("plan", ["mixers.M.lag=2"], ["has both a lag and a window"]),
]
STAGES = [
    ("plan", ["stages=[]"], ["tiny.yaml: stages must begin with initialise"]),
    ("run", ["stages=[{align: {tokens: 1k, lr: 1e-3}}]"], ["stages must begin with initialise"]),
    ("plan", ["stages.3={initialise: {}}"], ["stages.3: initialise can only come first"]),
    ("run", ["stages.3={align: {}, orient: {}}"], ["each entry of stages is one stage, not align, orient"]),
    ("plan", ["stages.imitate.lora={rank: 4}"], ["lora is given, but train is 'mixers'", "set train: lora"]),
    ("plan", ["stages.imitate.lr={new: 1e-3}"], ["stages.imitate: lr gives rates for new", "also trains 's"]),
    ("run", ["stages.imitate.lr={new: 1e-3}"], ["stages.imitate: lr gives rates for new", "also trains 's"]),
    ("run", ["twin=true", "mixers.M={mixer: mamba2}"], ["twin: true needs mixers with a window branch"]),
]
OVERRIDES = [
    ("run", ["novalue"], ["override 'novalue' should read key.sub=value"]),
    ("plan", ["stages.9.lr=1"], ["there is no '9' here", "initialise, orient"]),
    ("plan", ["stages.aline.lr=1"], ["there is no 'aline' here", "did you mean 'align'"]),
    ("plan", ["stages.².lr=1"], ["there is no '²' here", "initialise, orient"]),
    ("run", ["data.train." + "9" * 5000 + ".weight=1.0"], ["there is no '99999"]),
    ("run", ["seed=[1"], ["override 'seed=[1': its value is not valid YAML"]),
    ("plan", ["pattern.x=1"], ["pattern is 'AM' and has no parts"]),
]


@pytest.mark.parametrize(
    ("verb", "overrides", "parts"),
    [*KEYS, *TYPES, *RANGES, *LAYOUTS, *STAGES, *OVERRIDES],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else None,
)
def test_recipes(place, refuse, verb, overrides, parts):
    refuse(place, [verb, "tiny.yaml", *overrides], parts)


FILES = {
    "broken.yaml": (b"teacher: [a", ["broken.yaml is not valid YAML"]),
    "list.yaml": (b"- teacher", ["list.yaml should be a mapping of keys, but is a list"]),
    "nothing.yaml": (b"", ["nothing.yaml should be a mapping of keys, but is empty"]),
    "binary.yaml": (b"\x80\x81\x82", ["binary.yaml is not a text file (byte 0 is not UTF-8)", "a recipe is a YAML file"]),
    "twice.yaml": (b"teacher: a\nteacher: b", ["twice.yaml", "the key 'teacher' is given twice"]),
    "layer-twice.yaml": (b"mixers: {M: {mixer: mamba2}, M: {mixer: attention}}", ["the key 'M' is given twice"]),
    "number.yaml": (b"mixers: {1.5: {mixer: mamba2}}", ["number.yaml", "the key 1.5 is not a name"]),
    "few.yaml": (b"teacher: a", ["few.yaml: pattern is missing", "few.yaml: data is missing"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_files_that_are_no_recipe(place, tmp_path, refuse, verb, name):
    content, parts = FILES[name]
    (tmp_path / name).write_bytes(content)
    refuse(place, [verb, tmp_path / name], parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "no-such-recipe"], ["there is no recipe 'no-such-recipe'", "of the shipped ones"]),
        (["plan", "runs"], ["there is no recipe 'runs': no such file"]),
        (["recipes", "show", "quickstat"], ["there is no shipped recipe 'quickstat'", "did you mean 'quickstart'"]),
        (["recipes", "cp", "quickstrat"], ["there is no shipped recipe 'quickstrat'", "did you mean 'quickstart'"]),
        (["recipes", "cp", "quickstart", "tiny.yaml"], ["tiny.yaml exists already", "name another file"]),
        (["recipes", "cp", "quickstart", "tiny.yaml/x.yaml"], ["tiny.yaml/x.yaml could not be written", "name another"]),
        (["run", "tiny.yaml", "trackers=[dvclive]"], ["dvclive", "pip install"]),
        (["run", "tiny.yaml", "--stop-after", "-1"], ["--stop-after is -1", "a number above 0"]),
        (["run", "tiny.yaml", "--stop-after", "soon"], ["--stop-after", "valid"]),
        (["run"], ["Missing argument"]),
        (["frobnicate"], ["No such command 'frobnicate'"]),
        (["plan", "tiny.yaml", "--fresh"], ["No such option", "--fresh"]),
    ],
    ids=lambda value: " ".join(value) if value[0].islower() else None,
)
def test_commands(place, refuse, arguments, parts):
    refuse(place, arguments, parts)


def test_the_python_api_says_the_same(place):
    with pytest.raises(UserError, match="there is no recipe 'gone'"):
        distill.run("gone")
    with pytest.raises(UserError, match=r"data\.batch is 0"):
        distill.run("tiny.yaml", overrides=["data.batch=0"], runs="runs")
    with pytest.raises(UserError, match="--stop-after is 0"):
        distill.run("tiny.yaml", runs="runs", stop_after=0)

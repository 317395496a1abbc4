"""Students' folders that are damaged or bring code, and what `generate` is asked for that it cannot do."""

import shutil
import sys

import pytest
import torch

from distill import cli
from tests.distill.mistakes.damaged_students import (
    RAN,
    attention,
    code,
    code_of_the_tokenizer,
    entry,
    fifo,
    index_of,
    infinite,
    layout,
    linked,
    mixer,
    program,
    settings,
    tokenizer,
    vocabulary,
)
from tests.distill.mistakes.damaged_teachers import config, cut, pickled, weights, without, written

UP = "model.layers.2.mlp.up_proj.weight"
ENTRY = "config.json's `distill` entry"
REGEX = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
ADDED = {"id": 10**6, "content": "<x>", "special": True}
ADDED |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

# what is done to the student's folder, and what the message must hold
DAMAGES = {
    "code of the model": (code, ["comes with its own code, which is not run", "--trust-remote-code"]),
    "code of the tokenizer": (
        code_of_the_tokenizer,
        ["comes with its own code, which is not run", "--trust-remote-code"],
    ),
    "an unknown place for code": (
        config(auto_map={"AutoTrainer": "evil.T"}),
        ["auto_map has the key 'AutoTrainer', and transformers has no such class", "take the entry out"],
    ),
    "code that is no class": (
        config(auto_map={"AutoConfig": 3}),
        ["auto_map's AutoConfig is 3; it should read module.Class"],
    ),
    "a kernel of the hub": (
        config(_attn_implementation="kernels-community/x"),
        ["_attn_implementation is 'kernels-community/x', which transformers would fetch from elsewhere and run"],
    ),
    "a pickle": (pickled, ["there is no model.safetensors, and no model.safetensors.index.json", "'pytorch_model.bin'"]),
    "an index of a pickle": (
        index_of("pytorch_model.bin"),
        ["names 'pytorch_model.bin', which is a pickle, and unpickling"],
    ),
    "an index of elsewhere": (index_of("../x.safetensors"), ["names the file '../x.safetensors'; shards lie beside"]),
    "an index of a missing shard": (
        index_of("y.safetensors"),
        ["its index names y.safetensors, which is not in the folder"],
    ),
    "an adapter as a pickle": (written("adapter_model.bin", b"x"), ["adapter_model.bin is an adapter as a pickle"]),
    "a link out": (linked("generation_config.json"), ["'generation_config.json' is a link that leaves the folder"]),
    "a pipe": (fifo("config.json"), ["'config.json' is no plain file"]),
    "no config": (without("config.json"), ["'config.json' cannot be read: No such file"]),
    "a list for a config": (written("config.json", b"[]"), ["config.json holds a list, where an object"]),
    "a deep config": (
        written("config.json", b"[" * 100_000),
        ["config.json is not a valid JSON file: it is nested too deep"],
    ),
    "half a header": (cut("model.safetensors", 300), ["model.safetensors ends inside its header"]),
    "a missing weight": (weights(lambda t: t.pop(UP)), ["has no weights for", UP]),
    "another shape": (weights(lambda t: t.update({UP: torch.zeros(3, 3)})), [f"{UP} has the shape [3, 3], but by config"]),
    "NaN weights": (weights(lambda t: t[UP][0].fill_(torch.nan)), ["weights that are not finite (NaN or infinite), ", UP]),
    "infinite logits": (infinite, ["gives logits that are not finite", "output is that of model.norm", "diverged"]),
    "layers without end": (
        config(num_hidden_layers=10**9),
        ["num_hidden_layers is 1000000000; it should be a whole number"],
    ),
    "a huge vocabulary": (config(vocab_size=2**23), ["by config.json the model has 268,4", "but its files hold 52,808"]),
    "no layout": (entry(lambda found: found.pop("layout")), [f"{ENTRY}: layout is None; it should be a mapping"]),
    "another format": (entry(lambda found: found.update(format=[1])), [f"{ENTRY} has format [1]; this version reads 2"]),
    "a pattern of another depth": (layout(pattern="AM"), ["2 layers with attention in", "has 4 layers there"]),
    "a pattern that is a number": (layout(pattern=5), ["layout.pattern is 5; it should be a letter for each of"]),
    "meta tokens without end": (layout(meta_tokens=10**9), ["layout.meta_tokens is 1000000000; it should be"]),
    "an unknown mixer": (
        mixer(mixer="mambo"),
        ["layout.mixers.M.mixer is 'mambo'; it should be one of attention, discrete"],
    ),
    "an unknown option": (
        mixer(d_stat=8),
        ["layout.mixers.M: mixer discrete_mamba2 has no option 'd_stat'; did you mean 'd_s"],
    ),
    "an option of another type": (mixer(d_conv="4"), ["mixer discrete_mamba2: d_conv is '4', which is no int"]),
    "an option without end": (mixer(window={"size": 10**30}), ["layout.mixers.M.window.size is 10000000000"]),
    "far more than its files": (mixer(d_state=16_384), ["has the shape [96], but by config.json it is [131104]"]),
    "a state without end": (mixer(d_state=10**8), ["d_state is 100000000, which is too large"]),
    "another place": (entry(lambda found: found["place"].update(layers="model.layerz")), ["model.layerz.*.self_attn"]),
    "no module's place": (entry(lambda found: found["place"].update(name="__class__")), ["model.layers.*.__class__, but"]),
    "heads that are text": (attention(n_heads="4"), ["attention.n_heads is '4'; it should be a whole number from 1"]),
    "a scale below 0": (attention(softmax_scale=-1.0), ["attention.softmax_scale is -1.0; it should be a number from 0"]),
    "a layer that is none": (attention(exceptions={"9": {}}), ["attention.exceptions is '9'; it should be a layer from 0"]),
    "a teacher that is none": (
        entry(lambda found: found.update(teacher=5)),
        ["teacher is 5; it should be a mapping of its"],
    ),
    "an end that is none": (
        settings(eos_token_id={"a": 1}),
        ["generation_config.json: eos_token_id is {'a': 1}; it should"],
    ),
    "a search that needs code": (settings(penalty_alpha=0.6, top_k=4), ["cannot generate: ", "its generation_config.json"]),
    "a penalty below 0": (settings(repetition_penalty=-1.0), ["`penalty` has to be a strictly positive float"]),
    "half a tokenizer": (cut("tokenizer.json", 500), ["'tokenizer.json' is not a valid JSON file", "tokenizer files there"]),
    "a tokenizer that is a list": (
        written("tokenizer.json", b"[]"),
        ["tokenizer.json holds a list", "tokenizer files there"],
    ),
    "a broken expression": (
        vocabulary(lambda t: t.update(pre_tokenizer=REGEX)),
        ["Oniguruma error: end pattern with unmatc"],
    ),
    "an expression that never comes to an end": (
        vocabulary(lambda t: t.update(pre_tokenizer=REGEX | {"pattern": {"Regex": "((a|aa|h| |p)+)+$x"}})),
        ["fails on this prompt: ", "retry-limit-in-match over"],
    ),
    "a table of characters that is none": (
        vocabulary(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ["cannot be loaded: Precompiled", "tokenizer files there"],
    ),
    "a token beyond": (vocabulary(lambda t: t["added_tokens"].append(ADDED)), ["has the token 320", "embeds only 320"]),
    "a template that is a number": (tokenizer(chat_template=5), ["tokenizer_config.json: chat_template is 5; it should be"]),
}


@pytest.fixture
def student(place, tmp_path):
    """A copy of a finished run's student."""
    return shutil.copytree(place / "runs" / "finished" / "student", tmp_path / "in" / "student")


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_students(place, student, refuse, name):
    damage, parts = DAMAGES[name]
    damage(student)
    refuse(place, ["generate", student, "a happy" + 60 * "a", "--tokens", "2"], parts)
    assert not (student.parent / RAN).exists(), "code of the folder ran"


def test_damaged_students_are_not_judged(place, student, refuse):
    weights(lambda tensors: tensors[UP][0].fill_(torch.nan))(student)
    refuse(place, ["eval", student], ["weights that are not finite", UP])
    weights(lambda tensors: tensors[UP][0].fill_(1.0))(student)
    entry(lambda found: found.update(selected={"by": 3}))(student)
    refuse(place, ["eval", student], ["config.json's distill: selected.by is 3"])


def generates(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill", "generate", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert not ended.value.code
    return capsys.readouterr().out


def test_students_load_through_installed_code(place, student, monkeypatch, capsys):
    """Not through what lies beside them, on a terminal either, and with the flag either."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    wanted = generates([student, "a river", "--tokens", "2"], monkeypatch, capsys)
    program(student)
    config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(student)
    (student / "custom_generate").mkdir()
    shutil.copy(student / "evil.py", student / "custom_generate" / "generate.py")
    assert generates([student, "a river", "--tokens", "2"], monkeypatch, capsys) == wanted
    assert not (student.parent / RAN).exists()
    assert generates([place / "out", "a river", "--tokens", "2", "--trust-remote-code"], monkeypatch, capsys) == wanted


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["a\udcff"], ["the prompt is not UTF-8 at character 2"]),
        ([""], ["the prompt '' has no tokens"]),
        (["word " * 600], ["the prompt is ", "tokens, but ", "has positions for 512; give it a shorter one"]),
        (["a river", "--tokens", "600"], ["--tokens is 600 after a prompt of", "has positions for 512; make it 5"]),
        (["a river", "--tokens", "0"], ["--tokens is 0; it takes a whole number from 1 to 1,048,576"]),
        (["a river", "--tokens", "-3"], ["--tokens is -3; it takes a whole number from 1 to 1,048,576"]),
        (
            ["a river", "--tokens", "1000000000000"],
            ["--tokens is 1000000000000; it takes a whole number from 1 to 1,048,576"],
        ),
        *(
            (["a river", f"--temperature={value}"], [f"--temperature is {said}; it takes 0 or a number from 0.001 to 1,000"])
            for value, said in (("-1", "-1.0"), ("nan", "nan"), ("inf", "inf"), ("1e-40", "1e-40"), ("1e30", "1e+30"))
        ),
        (["a river", "--chat"], ["has no chat template; leave out --chat"]),
    ],
)
def test_prompts_and_options(place, student, refuse, arguments, parts):
    refuse(place, ["generate", student, *arguments], parts)


LOOP = "{% for i in range(99999) %}"
TEMPLATES = {
    "endless": (2 * LOOP + 2 * "{% endfor %}", "did not end within 0.5 seconds"),
    "a long range": ("{% for i in range(10**12) %}x{% endfor %}", "fails: Range too big"),
    "a large string": ("{{ 'a' * 10**11 }}", "needs more than 1 GiB of memory"),
    "a large result": ("{{ 'a' * 3 * 10**7 }}", "writes more than 16,777,216 bytes"),
    "one that raises": ("{{ raise_exception('no system turns') }}", "fails: no system turns"),
    "one that raises nothing": ("{{ raise_exception('') }}", "fails without a reason"),
    "one that is cut": ("{% for", "fails: unexpected 'end of template'"),
    "one that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "one that looks around": ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(place, student, refuse, monkeypatch, name):
    template, said = TEMPLATES[name]
    monkeypatch.setattr("distill.chat.SECONDS", 0.5 if name == "endless" else 30)
    (student / "chat_template.jinja").write_text(template)
    refuse(place, ["generate", student, "a river", "--chat"], [f"the chat template of {student} {said}", "--chat"])


def test_odd_bytes_of_a_chat_template(place, student, refuse, monkeypatch, capsys):
    (student / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    refuse(place, ["generate", student, "a river", "--chat"], ["chat_template.jinja is not UTF-8"])
    (student / "chat_template.jinja").write_text("{{ messages[0]['content'] }}, and")
    said = generates([student, "a river", "--tokens", "2", "--chat"], monkeypatch, capsys)
    plain = generates([student, "a river, and", "--tokens", "2"], monkeypatch, capsys)
    assert plain == "a river, and" + said

"""Our scorer and lm-evaluation-harness's give the same numbers on the same items, through our model and through its own."""

import json

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

from distill.build import build
from distill.evaluation import harness, tasks
from distill.evaluation.scoring import score
from students.config import Layout

TEXT = "river stone a the lake of water long runs deep into sea and under old bridge"
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


def sentence(index, length):
    words = TEXT.split()
    return " ".join(words[(7 * index + 5 * place + place * place) % len(words)] for place in range(length))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Items of three forms, and the harness's tasks for them, as its own WinoGrande, ARC and LAMBADA are written."""
    folder = tmp_path_factory.mktemp("harness")
    choices = [
        {
            "ctx": f"Question: {sentence(n, 6)}?\nAnswer:",
            "choices": [sentence(n + 3 * c, 1 + (n + c) % 4) for c in range(2 + n % 3)],
            "label": n % 2,
        }
        for n in range(24)
    ]
    partial = [
        {"contexts": [f"{sentence(n, 4)} {name}" for name in ("Ann", "Tom")], "target": sentence(n + 1, 3), "label": n % 2}
        for n in range(12)
    ]
    single = [{"ctx": sentence(n, 12), "choices": [sentence(n + 5, 1)], "label": 0} for n in range(12)]
    common = {"dataset_path": "json", "test_split": "train", "metric_list": METRICS, "metadata": {"version": 1}}
    forms = {
        "cloze": (choices, {"doc_to_text": "{{ctx}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}),
        "partial": (partial, {"doc_to_text": "label", "doc_to_choice": "{{contexts}}", "doc_to_target": "target"}),
        "single": (single, {"doc_to_text": "{{ctx}}", "doc_to_target": "{{' ' + choices[0]}}"}),
    }
    for name, (items, form) in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        files = {"dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")}}
        task = {"task": f"local_{name}", "output_type": "multiple_choice", **common, **files, **form}
        if name == "single":
            task |= {"output_type": "loglikelihood", "metric_list": METRICS[:1]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder, {name: items for name, (items, _) in forms.items()}


@pytest.fixture(scope="module")
def manager(place):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(place[0]), include_defaults=False)


@pytest.fixture
def student(teacher):
    return build(teacher, Layout("AMAM", {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}}))[0]


@pytest.mark.parametrize(
    ("form", "task"), [("cloze", "arc_easy"), ("cloze", "arc_challenge"), ("partial", "winogrande"), ("single", "lambada")]
)
def test_the_local_scorer_agrees_item_by_item(place, manager, teacher, student, form, task):
    items = place[1][form]
    questions = [tasks.TASKS[task].question(item) for item in items]
    for model in (None, student):
        ours = tasks.run_task(teacher, model, task, questions)
        theirs = harness.run_harness_task(
            harness.HarnessModel(teacher, model), f"local_{form}", tasks.TASKS[task].metric, None, manager
        )
        for key in ("score", "error", "chance", "items", "correct", "acc"):
            assert ours.get(key) == theirs.get(key) or (key == "acc" and form == "single"), key
        assert 0 < ours["score"] < 1 or form == "single"


def test_log_likelihoods_are_those_of_the_harness_own_model(place, teacher):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(item["ctx"], f" {choice}") for item in place[1]["cloze"] for choice in item["choices"]]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    own = HFLM(pretrained=teacher.model, tokenizer=teacher.tokenizer, batch_size=4, device="cpu")
    ours = [answers[0] for answers in score(teacher, None, tasks.marked(teacher, pairs))]
    through = harness.HarnessModel(teacher, None).loglikelihood(requests)
    for (logprob, greedy), answer, adapted in zip(own.loglikelihood(requests), ours, through, strict=True):
        assert answer.logprob == pytest.approx(logprob, rel=1e-4) and answer.greedy == greedy
        assert adapted == (pytest.approx(answer.logprob), answer.greedy)


def test_rolling_log_likelihoods_and_generation(teacher, student):
    from lm_eval.api.instance import Instance

    text = sentence(2, 300)  # longer than the teacher has positions for
    wrapped = harness.HarnessModel(teacher, None)
    (total,) = wrapped.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = [teacher.tokenizer.eos_token_id, *teacher.tokenizer(text)["input_ids"]]
    assert len(ids) > 513
    expected = 0.0
    for start in range(0, len(ids) - 1, 512):
        piece = torch.tensor([ids[start : start + 512]])
        if start + 512 < len(ids):
            logprobs = teacher.model(piece).logits[0].log_softmax(-1)
            expected += logprobs.gather(-1, torch.tensor(ids[start + 1 : start + 513])[:, None]).sum().item()
        else:  # the last window looks back as far as it can
            last = torch.tensor([ids[-513:-1]])
            logprobs = teacher.model(last).logits[0].log_softmax(-1)[-(len(ids) - 1 - start) :]
            expected += logprobs.gather(-1, torch.tensor(ids[start + 1 :])[:, None]).sum().item()
    assert total == pytest.approx(expected, rel=1e-4)
    request = Instance("generate_until", {}, ("The river", {"until": [], "max_gen_toks": 6}), 0)
    (said,) = harness.HarnessModel(teacher, student).generate_until([request])
    prompt = torch.tensor([teacher.tokenizer("The river")["input_ids"]])
    out = student.generate(prompt, max_new_tokens=6, do_sample=False)
    assert said == teacher.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    stop = Instance("generate_until", {}, ("The river", {"until": [said[1:3]], "max_gen_toks": 6}), 0)
    assert harness.HarnessModel(teacher, student).generate_until([stop]) == [said.split(said[1:3])[0]]


def test_what_the_harness_cannot_get_is_not_run(teacher, monkeypatch):
    def offline(*arguments):
        raise ConnectionError("no network")

    monkeypatch.setattr(harness, "run_harness_task", offline)
    found = harness.run_tasks(teacher, None, ["piqa", "mmlu_letters"], 2)
    assert found["piqa"]["not_run"] == "lm-evaluation-harness could not load it: ConnectionError no network"
    assert "--tasks FOLDER" in found["mmlu_letters"]["not_run"]

"""transformers' Trainer and TRL's SFTTrainer take a student as they take any causal language model."""

import copy
import inspect
import pickle

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

import students
from students.model import student_class
from teachers.families import FAMILIES
from tests.ecosystem.conftest import every_layout

pytestmark = pytest.mark.ecosystem


def rows(count=4, time=13):
    ids = torch.randint(1, 320, (count, time)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids])


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def cross_entropy(model, data, total=None):
    """Of the next tokens, their mean, or their sum over `total`."""
    with torch.no_grad():
        logits = model(torch.tensor(data["input_ids"]), use_cache=False).logits[:, :-1]
    labels = torch.tensor(data["labels"])[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return (loss / ((labels != -100).sum() if total is None else total)).item()


@every_layout
def test_trainer_evaluates_and_keeps_the_best(student, tmp_path):
    student.requires_grad_(True)
    train, held_out = rows(), rows()
    before = cross_entropy(student, held_out)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = Trainer(student, arguments(tmp_path, **best), train_dataset=train, eval_dataset=held_out)
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-4)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == pytest.approx(min(losses)) and len(losses) >= 2
    assert cross_entropy(student.eval(), held_out) == pytest.approx(min(losses), rel=1e-4)
    again = students.load(trainer.state.best_model_checkpoint)
    assert cross_entropy(again, held_out) == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("layout", ["mamba2", "Hymba"])
def test_the_loss_is_transformers_own(student, teacher):
    """Alone, over a number of items that the trainer counts, and with labels that are shifted already."""
    data = rows()
    ids, labels = (torch.tensor(data[name]) for name in ("input_ids", "labels"))
    assert student(ids, labels=labels).loss.item() == pytest.approx(cross_entropy(student, data), rel=1e-5)
    by_items = student(ids, labels=labels, num_items_in_batch=7).loss.item()
    assert by_items == pytest.approx(cross_entropy(student, data, 7), rel=1e-5)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert student(ids, labels=labels, shift_labels=shifted).loss.item() == pytest.approx(by_items * 7 / 40, rel=1e-5)
    assert student.loss_type == teacher.model.loss_type and student.loss_function is teacher.model.loss_function
    assert student(ids).loss is None


def test_every_family_says_that_it_takes_labels():
    for family in FAMILIES:
        made = student_class(family)
        taken = inspect.signature(made.forward).parameters
        assert find_labels(made) == ["labels"] and taken["rest"].kind is inspect.Parameter.VAR_KEYWORD


@every_layout
def test_gradients_add_up_over_micro_batches(student, tmp_path):
    """num_items_in_batch: two micro batches of unequal numbers of labels are one batch."""
    student.requires_grad_(True)
    data = rows()
    unequal = [
        {**row, "labels": [-100] * (9 if index < 2 else 1) + row["labels"][9 if index < 2 else 1 :]}
        for index, row in enumerate(data)
    ]
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        model = copy.deepcopy(student)
        options = {
            "gradient_accumulation_steps": steps,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
        }
        settings = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            learning_rate=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            train_sampling_strategy="sequential",
            **options,
        )
        Trainer(model, settings, train_dataset=Dataset.from_list(unequal)).train()
        weights.append(torch.cat([part.detach().flatten() for part in model.parameters()]))
    start = torch.cat([part.detach().flatten() for part in student.parameters()])
    assert (weights[0] - weights[1]).norm() < 1e-3 * (weights[0] - start).norm()


@every_layout
def test_copies_and_pickles(student, ids):
    wanted = student(ids).logits
    for config in (copy.deepcopy(student.config), pickle.loads(pickle.dumps(student.config))):
        assert type(config) is type(student.config) and config.to_dict() == student.config.to_dict()
    for again in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert type(again) is type(student) and torch.equal(again(ids).logits, wanted)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
    assert torch.equal(student(ids).logits, wanted)


@every_layout
def test_sft_trainer(student, tokenizer, tmp_path):
    """A prompt and an answer, padded rows, a step, the loss of the answers alone."""
    trl = pytest.importorskip("trl")

    student.requires_grad_(True)
    texts = [("What is it?", " It is a test of no great length."), ("And this?", " Short.")]
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=48,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(student, settings, train_dataset=data, processing_class=tokenizer)
    wanted = answers_alone(student, tokenizer, texts)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(wanted, rel=1e-3) and losses[1] < losses[0]


def answers_alone(student, tokenizer, texts):
    """The mean cross-entropy of the answers' tokens, each text by itself."""
    total, count = 0.0, 0
    for prompt, answer in texts:
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*start, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = student(ids, use_cache=False).logits[0, len(start) - 1 : -1]
        total += F.cross_entropy(logits, ids[0, len(start) :], reduction="sum").item()
        count += ids.shape[1] - len(start)
    return total / count

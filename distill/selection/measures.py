"""The measures of a selection: recall in synthetic texts, KL to the teacher on held-out text, accuracy on task items.

MEASURES is the table.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.evaluation.questions import TASKS, Question
from distill.evaluation.recall.families import make
from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.wording import SELECTING
from distill.evaluation.scoring import Marked, score
from distill.evaluation.task_files import check_folder, find_file, read_questions
from distill.evaluation.tasks import marked
from distill.output_head import full_products, wide_head, widened
from distill.runs.session import Session
from distill.selection.options import Options
from distill.text.heldout import Heldout
from students.kernels.linear_kl import linear_kl
from students.skeleton import Student

CHARACTERS = 4  # of a token, roughly: for cost estimates before a tokenizer is loaded


class Material:
    """The texts that every model of one selection is measured on, made when they are first needed."""

    def __init__(self, session: Session, options: Options) -> None:
        self.session, self.options = session, options
        self.teacher = session.teacher

    @cached_property
    def texts(self) -> dict[str, list[Marked]]:
        """The recall texts by family. No evaluation has their words or their seed."""
        options = self.options
        tokens, seed = (
            Tokens(cast(PreTrainedTokenizerBase, self.teacher.tokenizer), SELECTING),
            -1 - self.session.recipe.seed,
        )
        return {family: make(tokens, family, options.length, options.trials, seed=seed) for family in options.families}

    @cached_property
    def heldout(self) -> Heldout:
        """Held-out text that no table is measured on, with the teacher's hidden states."""
        return self.session.selection_text(self.options.tokens)

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """The task items by task."""
        return read_tasks(self.options)

    def prepare(self, name: str) -> None:
        """Make the texts of a measure, so that the first measurement takes no longer than the others."""
        with self.session.accelerator.autocast():
            getattr(self, MEASURES[name].material)

    @torch.no_grad()
    def measure(self, model: Student, name: str) -> dict[str, float]:
        """The numbers of one measure for one model, with the tokens that were read."""
        with self.session.accelerator.autocast():
            return MEASURES[name].run(self, model)


def measure_recall(material: Material, model: Student) -> dict[str, float]:
    """Measure recall in synthetic texts; both numbers are means over families.

    choice: mean log-probability of an answer's tokens, in nats, over the tokens that occur in answers of its family. It
    falls long before an answer is lost, so a few texts tell layers apart. recalled: share of answers that greedy decoding
    gives completely."""
    choices, recalled, tokens = [], [], 0
    for texts in material.texts.values():
        among = sorted({text.ids[place] for text in texts for span in text.spans for place in range(*span)})
        answers = [found for text in score(material.teacher, model, texts, among) for found in text]
        lengths = [end - start for text in texts for start, end in text.spans]
        choices.append(sum(answer.logprob for answer in answers) / sum(lengths))
        recalled.append(sum(answer.greedy for answer in answers) / len(answers))
        tokens += sum(len(text.ids) for text in texts)
    return {"choice": sum(choices) / len(choices), "recalled": sum(recalled) / len(recalled), "tokens": tokens}


def measure_divergence(material: Material, model: Student) -> dict[str, float]:
    """Measure kl: KL(teacher || model) of the next token on held-out text, in nats a token."""
    total, weight, tokens = 0.0, 0.0, 0
    head, teacher_head = wide_head(model), wide_head(material.teacher.model)
    for batch, teacher_hidden in zip(material.heldout.batches, material.heldout.hidden, strict=True):
        tokens += batch.tokens
        count = batch.weights.sum().item()
        weight += count
        hidden = widened(model.hidden(batch.ids, batch.documents).flatten(0, 1), head)
        wanted = widened(teacher_hidden.flatten(0, 1), teacher_head)
        with full_products(hidden.device):
            total += count * linear_kl(hidden, head, wanted, teacher_head, batch.weights.flatten()).item()
    return {"kl": total / weight, "tokens": tokens}


def measure_task(material: Material, model: Student) -> dict[str, float]:
    """Measure task items; both numbers are means over tasks.

    right: log-probability of the right choice among an item's choices, in nats; for an item with one answer, the mean
    log-probability of that answer's tokens. accuracy: share of items in which the right choice is the likeliest."""
    rights, accuracies, tokens = [], [], 0
    for questions in material.questions.values():
        texts = marked(material.teacher, [pair for question in questions for pair in question.pairs])
        answers = iter([found for (found,) in score(material.teacher, model, texts)])
        lengths = iter([end - start for text in texts for start, end in text.spans])
        right, correct = 0.0, 0
        for question in questions:
            found, sizes = [next(answers) for _ in question.pairs], [next(lengths) for _ in question.pairs]
            logprobs = torch.tensor([answer.logprob for answer in found], dtype=torch.float64)
            single = len(found) == 1
            right += (logprobs / sizes[0] if single else logprobs.log_softmax(0))[question.label].item()
            correct += found[0].greedy if single else int(logprobs.argmax()) == question.label
        rights.append(right / len(questions))
        accuracies.append(correct / len(questions))
        tokens += sum(len(text.ids) for text in texts)
    return {"right": sum(rights) / len(rights), "accuracy": sum(accuracies) / len(accuracies), "tokens": tokens}


def read_tasks(options: Any) -> dict[str, list[Question]]:
    """The items of the tasks that the options name.

    Raises:
        UserError: the folder does not exist, a task has no file in it, or a file is not in its task's form.
    """
    folder = check_folder(options.tasks)
    found: dict[str, list[Question]] = {}
    for name in options.names:
        file = find_file(folder, TASKS[name].file or name)
        if file is None:
            raise UserError(f"pattern.names has {name}, but there is no {name}.jsonl (.xz, .gz) in {folder}")
        found[name] = read_questions(name, file, options.items)
    return found


def tokens_of(options: Options, measures: Sequence[str]) -> int:
    """The approximate number of tokens that one measurement reads, known before anything is loaded."""
    return sum(MEASURES[name].tokens(options) for name in measures)


def _recall_tokens(options: Options) -> int:
    return len(options.families) * options.trials * options.length


def _task_tokens(options: Options) -> int:
    questions = [question for found in read_tasks(options).values() for question in found]
    return math.ceil(sum(len(a) + len(b) for question in questions for a, b in question.pairs) / CHARACTERS)


class Measure(NamedTuple):
    """One measure of a model.

    run: (material, model) -> named numbers, with the `tokens` read. material: the attribute of `Material` that it reads.
    tokens: the approximate number of tokens that it reads, from a scorer's options.
    """

    run: Callable[[Material, Student], dict[str, float]]
    material: str
    tokens: Callable[[Options], int]


MEASURES = {
    "recall": Measure(measure_recall, "texts", _recall_tokens),
    "kl": Measure(measure_divergence, "heldout", lambda options: options.tokens),
    "task": Measure(measure_task, "questions", _task_tokens),
}

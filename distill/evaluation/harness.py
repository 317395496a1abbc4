"""The adapter to lm-evaluation-harness: an `lm_eval` LM whose log-likelihoods come from `scoring.score`.

It needs the extra `eval`, and for tasks from the hub a network or a filled cache. Texts are split into tokens, and get start
tokens, as in the harness's own class for transformers models by default, and as in `tasks`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from distill.evaluation.questions import SEED, TASKS, summary
from distill.evaluation.scoring import Marked, score
from distill.output_head import generating_wide
from distill.text.encoding import opened, opening
from students.skeleton import Student
from teachers.teacher import Teacher

LONGEST = 2048  # tokens of a window if the teacher's config has no limit
NEW_TOKENS = 64  # of a generated answer if the request has no limit


class HarnessModel(TemplateLM):
    """A teacher or its student, with the interface that the harness calls."""

    def __init__(self, teacher: Teacher, model: Student | None) -> None:
        super().__init__()
        self.teacher, self.model = teacher, model
        self.tokenizer: Any = teacher.tokenizer
        self.longest = teacher.positions() or LONGEST
        self.opening = opening(cast(PreTrainedTokenizerBase, teacher.tokenizer))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Tokenize a text, with the tokenizer's start tokens unless `add_special_tokens` is false."""
        start = self.opening if add_special_tokens is None or add_special_tokens else []
        return opened(self.tokenizer(string, add_special_tokens=False)["input_ids"], start)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Score each request ((context, continuation), context tokens, continuation tokens) as (log-likelihood, greedy)."""
        texts = []
        for _, context, continuation in requests:
            before = context[-max(1, self.longest + 1 - len(continuation)) :]
            texts.append(Marked(before + continuation, ((len(before), len(before) + len(continuation)),)))
        return [(found.logprob, found.greedy) for (found,) in score(self.teacher, self.model, texts)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows as long as the teacher's positions."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.longest, 1)
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily up to the first of each request's stop strings, one prompt at a time."""
        with generating_wide(self.teacher.model if self.model is None else self.model):
            return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: Mapping[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        limit = options.get("max_gen_toks") or NEW_TOKENS
        ids = self.tok_encode(context)[-max(1, self.longest - limit) :]
        model: Any = self.teacher.model if self.model is None else self.model
        out = model.generate(
            torch.tensor([ids], device=self.teacher.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.teacher.device),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id,
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
        )
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def run_tasks(teacher: Teacher, model: Student | None, names: Sequence[str], items: int | None) -> dict[str, dict]:
    """Run tasks by the harness; the results have the form of `tasks.row`. model: None runs the teacher."""
    wrapped = HarnessModel(teacher, model)
    found: dict[str, dict] = {}
    for name in names:
        if name == "mmlu_letters":
            found[name] = {"not_run": "permuted letters need a file: --tasks FOLDER with mmlu_cloze.jsonl"}
            continue
        try:
            found[name] = run_harness_task(wrapped, TASKS[name].harness or name, _metric(name), items, None)
        except (OSError, ImportError, ValueError) as error:  # no network, a data set that moved, a task of another version
            said = " ".join(str(error).split())[:200]
            found[name] = {"not_run": f"lm-evaluation-harness could not load it: {type(error).__name__} {said}"}
    return found


def run_harness_task(wrapped: HarnessModel, name: str, metric: str, items: int | None, manager: TaskManager | None) -> dict:
    """Run one task or group of the harness, in the form of `tasks.run_task`. items: the first N; None for all."""
    result = simple_evaluate(
        wrapped, tasks=[name], limit=items, log_samples=True, task_manager=manager, bootstrap_iters=0, random_seed=SEED
    )
    samples = [sample for task in sorted(result["samples"]) for sample in result["samples"][task]]
    correct = [bool(_number(sample[metric])) for sample in samples]
    counts = [len(sample["arguments"]) for sample in samples]
    chance = sum(1 / count if count > 1 else 0.0 for count in counts) / len(counts)
    found = summary(metric, correct, chance)
    for kind in ("acc", "acc_norm"):
        if kind in samples[0]:
            found[kind] = sum(_number(sample[kind]) for sample in samples) / len(samples)
    return found


def _metric(name: str) -> str:
    return "contains" if TASKS[name].generated else TASKS[name].metric


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list | tuple) else value)

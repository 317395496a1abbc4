"""Long texts read in chunks: scores of answers, and a progress bar for a prompt that takes seconds."""

import pytest
import torch
from rich.console import Console

from distill import generation
from distill.evaluation import scoring
from distill.evaluation.scoring import Marked, score
from distill.selection.switched import Switched
from students import cuts
from students.prompts import watcher
from tests.students.decoding_cases import CASES, student_of


def test_scores_of_long_texts(teacher, monkeypatch):
    """A row longer than a chunk goes through in chunks, and its answers are the same."""
    torch.manual_seed(1)
    texts = [Marked(torch.randint(1, 320, (size,)).tolist(), ((3, 5), (size - 2, size))) for size in (160, 150, 40)]
    student = student_of(teacher, *CASES["hymba"])
    models = (None, student)
    wanted = [score(teacher, model, texts) for model in models]
    monkeypatch.setattr(scoring, "widest_row", lambda model: 64)
    monkeypatch.setattr(cuts, "chunk_columns", lambda *shape: 64)
    seen = []
    for model in (teacher.model, student):
        model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    for model, answers in zip(models, wanted, strict=True):
        for found, same in zip(score(teacher, model, texts), answers, strict=True):
            assert [each.logprob for each in found] == pytest.approx([each.logprob for each in same], abs=1e-4)
            assert [each.greedy for each in found] == [each.greedy for each in same]
    assert max(seen) <= 64 and len(seen) > 2
    switched = Switched(teacher, student_of(teacher, "W", {"W": {"mixer": "attention", "window": 8}})).keep([1])
    assert len(score(teacher, switched, texts)) == 3  # whole: switches know no cache


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_for_prompts_of_seconds(terminal, monkeypatch, tmp_path):
    """On a terminal, and gone before the first token; a quick prompt has none."""
    written = (tmp_path / "seen").open("w+")
    monkeypatch.setattr(generation, "new_console", lambda stderr: Console(file=written, force_terminal=terminal, width=80))
    for soon in (0.0, 60.0):
        monkeypatch.setattr(generation, "SOON", soon)
        with generation.prompt_bar():
            for done in (64, 128, 150):
                if tell := watcher():
                    tell(done, 150)
        written.seek(0)
        found = written.read()
        assert ("64/150" in found) == (terminal and soon == 0)
        written.seek(0), written.truncate()

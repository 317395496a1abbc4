"""Proof in transformers, as a plain script: `python transformers.py JOB.json` in an environment that has transformers.

The job's folder is loaded in float32 by `AutoModelForCausalLM`, without this project, which is kept from being imported. It
answers what `answer.py` reads: what the model says of the texts, and what it goes on with, by `generate`, for all prompts
in one batch that is padded on the left. With `checks` it also gives how far ways of computing the same thing are apart: a
text in a padded batch, a prompt in chunks, tokens that are decoded from a cache.
"""

import importlib.abc
import json
import sys
from pathlib import Path

import numpy
import torch

OURS = ("distill", "students", "teachers")
STEPS = 10  # of every so many decoded tokens the whole distribution is compared
CHUNKS = (7, 100)  # columns of a prompt at a time


class Absent(importlib.abc.MetaPathFinder):
    """Keeps this project from being imported, where it is installed."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}: an export runs without this project", name=name)
        return None


class Along:
    """A logits processor that writes down what a model says at each step, and has it take given tokens, where there are any.

    forced: [prompts, steps], or None.
    """

    def __init__(self, forced):
        self.forced, self.at = forced, 0
        self.own, self.second, self.margins, self.rows = [], [], [], []
        self.said = []  # log-probabilities of the tokens taken

    def __call__(self, ids, scores):
        best = scores.float().topk(2, dim=-1)
        taken = best.indices[:, 0] if self.forced is None else self.forced[:, self.at]
        self.own.append(best.indices[:, 0])
        self.second.append(best.indices[:, 1])
        self.margins.append(best.values[:, 0] - best.values[:, 1])
        logs = scores.float().log_softmax(-1)
        self.said.append(logs.gather(1, taken[:, None])[:, 0])
        if self.at % STEPS == 0:
            self.rows.append(scores.float().clone())
        self.at += 1
        return torch.full_like(scores, float("-inf")).scatter(1, taken[:, None], 0.0)


def padded(texts):
    """Texts as one batch, padded on the left, and its mask."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


def alone(model, text):
    """The logits of every position of one text. [tokens, vocabulary]"""
    return model(torch.tensor([text]), use_cache=False).logits[0].float()


def said_of(logits, text):
    """The log-probability of every token of a text but the first."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def furthest(found, wanted, where):
    """The largest difference, and where: [difference, name, text, position, found, wanted]."""
    away = (found - wanted).abs()
    away[away.isnan()] = float("inf")
    place = numpy.unravel_index(int(away.argmax()), tuple(away.shape))
    return [float(away[place]), *where(int(place[0])), float(found[place]), float(wanted[place])]


def going_on(model, prompts, steps, forced):
    """What a model goes on with, all prompts in one batch. Returns the record and the tokens taken."""
    ids, mask = padded(prompts)
    along = Along(None if forced is None else torch.tensor(forced))
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[along],
    )
    return along, out[:, ids.shape[1] :].tolist()


def in_a_batch(model, texts, rows, whole):
    """How far texts in a padded batch are from each alone."""
    ids, mask = padded(texts)
    width, worst = ids.shape[1], None
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for number, text in enumerate(texts):
        found = logits[number, [width - len(text) + row for row in rows[number]]].float()
        away = furthest(found, whole[number], lambda row, number=number: (number, rows[number][row]))
        worst = max(worst or away, away, key=lambda each: each[0])
    return worst


def in_chunks(model, text, last):
    """How far the logits behind a text that came in chunks are from the whole text's."""
    worst = None
    for columns in (columns for columns in CHUNKS if columns < len(text)):
        out = model.generate(
            torch.tensor([text]),
            max_new_tokens=1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            prefill_chunk_size=columns,
            return_dict_in_generate=True,
            output_logits=True,
        )
        away = furthest(out.logits[0].float(), last[None], lambda _: (None, len(text) - 1))
        worst = max(worst or away, away, key=lambda each: each[0])
    return worst


def decoded(model, prompts, along, tokens):
    """How far what was decoded from a cache is from whole texts: distributions of some steps, log-probabilities of all."""
    worst = None
    for number, prompt in enumerate(prompts):
        logits = alone(model, prompt + tokens[number])
        first = len(prompt) - 1
        wanted = logits[first : first + len(tokens[number]) : STEPS]
        found = torch.stack([row[number] for row in along.rows])
        away = [furthest(found, wanted, lambda row, number=number, first=first: (number, first + row * STEPS))]
        found = torch.stack([step[number] for step in along.said])
        wanted = said_of(logits, prompt + tokens[number])[first:]
        away.append(furthest(found, wanted, lambda row, number=number, first=first: (number, first + row)))
        worst = max([worst or away[0], *away], key=lambda each: each[0])
    return worst


@torch.no_grad()
def answer(model, job):
    """Everything that a job asks of a model, as entries of answer.json, and the rows."""
    texts, rows = job["texts"], job["rows"]
    print("# the texts", flush=True)
    logs, whole = [], []
    for text, wanted in zip(texts, rows, strict=True):
        logits = alone(model, text)
        logs.append(said_of(logits, text).tolist())
        whole.append(logits[wanted])
    out, found = {"logprobs": logs, "checks": {}}, torch.cat(whole)
    if job["checks"]:
        print("# texts in one batch, padded on the left", flush=True)
        out["checks"]["left padding"] = in_a_batch(model, texts, rows, whole)
        print("# a prompt in chunks", flush=True)
        longest = max(range(len(texts)), key=lambda number: len(texts[number]))
        out["checks"]["chunks"] = in_chunks(model, texts[longest], whole[longest][-1])
        if out["checks"]["chunks"]:
            out["checks"]["chunks"][1] = longest
    if job["steps"]:
        print(f"# {job['steps']} tokens from a cache, {len(job['prompts'])} prompts in one batch", flush=True)
        along, tokens = going_on(model, job["prompts"], job["steps"], job["forced"])
        for name, steps in (("own", along.own), ("second", along.second), ("margins", along.margins)):
            out[name] = torch.stack(steps, 1).tolist()
        out["tokens"] = tokens
        if job["checks"]:
            out["checks"]["cached decoding"] = decoded(model, job["prompts"], along, tokens)
    return out, found.numpy()


def write(folder, out, rows):
    """Write an answer where its reader finds it, answer.json last."""
    numpy.save(Path(folder) / "rows.npy", rows)
    (Path(folder) / "answer.json").write_text(json.dumps(out))


def main(path):
    import transformers

    job = json.loads(Path(path).read_text())
    guard = Absent()
    sys.meta_path.insert(0, guard)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["folder"], dtype=torch.float32, trust_remote_code=job["trust_remote_code"]
        ).eval()
        out, rows = answer(model, job)
    finally:
        sys.meta_path.remove(guard)
    write(job["out"], out | {"version": transformers.__version__, "class": type(model).__name__}, rows)


if __name__ == "__main__":
    main(sys.argv[1])

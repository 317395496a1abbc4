"""Proof in llama.cpp, as a plain script: `python llama_cpp.py JOB.json`.

It runs in an environment that has numpy and either llama-cpp-python or xllamacpp.
It writes the answer that `answer.py` reads: the log-probabilities of the texts, and the tokens generated after all prompts.
With `strings` in the job it also writes llama.cpp's own tokens of these (`ids`). llama-cpp-python runs the texts in batches,
and all prompts in one batch. xllamacpp has only llama.cpp's server, which computes one token a request.
"""

import ctypes
import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy

BATCH = 256  # tokens at a time, so that longer texts come in chunks
FLOAT32 = 0  # ggml's number of the type
LOUD = 4  # ggml's level of errors
CERTAIN = 1e5  # added to a token's logit to make the server take it


class Library:
    """A model in this process, through llama-cpp-python's bindings of llama.cpp's own functions."""

    def __init__(self, path: Path, widths: list[int], exact: bool) -> None:
        """widths: lengths in tokens of the sequences that run in parallel. exact: whether keys and values are float32."""
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # the message of a failed assertion is enough
        from llama_cpp import llama_cpp as c

        self.c, self._log = c, c.llama_log_callback(lambda level, text, _: print_error(text) if level == LOUD else None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        c.llama_backend_init()
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocabulary = c.llama_model_get_vocab(self.model)
        self.size = c.llama_vocab_n_tokens(self.vocabulary)
        settings = c.llama_context_default_params()
        longest = -(-max(widths) // BATCH) * BATCH
        settings.n_ctx, settings.n_seq_max = longest * len(widths), len(widths)
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()
        if exact:
            settings.type_k = settings.type_v = FLOAT32
            settings.flash_attn_type = 0  # its sums are in float16
        self.context = c.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {path}")
        self.batch = c.llama_batch_init(BATCH, 0, 1)

    def ids(self, string: str) -> list[int]:
        """Tokenize a string with llama.cpp."""
        data = string.encode()
        room = (self.c.llama_token * (len(data) + 8))()
        count = self.c.llama_tokenize(self.vocabulary, data, len(data), room, len(room), True, False)
        return list(room[:count])

    def forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def run(self, entries: list[tuple[int, int, int, bool]]) -> list[numpy.ndarray]:
        """Run (sequence, position, token, wanted) and return the logits of those wanted, in their order."""
        found = []
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            self.batch.n_tokens = len(part)
            for at, (sequence, position, token, wanted) in enumerate(part):
                self.batch.token[at], self.batch.pos[at] = token, position
                self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, sequence
                self.batch.logits[at] = wanted
            if code := self.c.llama_decode(self.context, self.batch):
                raise SystemExit(f"llama.cpp could not run a batch of {len(part)} tokens (code {code})")
            for at, entry in enumerate(part):
                if entry[3]:
                    row = self.c.llama_get_logits_ith(self.context, at)
                    found.append(numpy.ctypeslib.as_array(row, (self.size,)).copy())
        return found

    def said(self, text: list[int], rows: list[int]) -> tuple[list[float], list[numpy.ndarray]]:
        """Return the log-probabilities of a text's tokens but the first, and the logits of the positions `rows`."""
        self.forget()
        logs: list[float] = []
        kept: list[numpy.ndarray] = []
        wanted = set(rows)
        for start in range(0, len(text), BATCH):
            part = [(0, at, text[at], True) for at in range(start, min(start + BATCH, len(text)))]
            for (_, at, _, _), row in zip(part, self.run(part), strict=True):
                if at in wanted:
                    kept.append(row)
                if at + 1 < len(text):
                    logs.append(float(log_softmax(row)[text[at + 1]]))
        return logs, kept

    def going_on(self, prompts: list[list[int]], steps: int, forced: list[list[int]] | None) -> dict[str, Any]:
        """Generate tokens after all prompts, in parallel."""
        self.forget()
        told = Told(len(prompts), forced)
        rows = self.run(
            [
                (number, at, token, at + 1 == len(prompt))
                for number, prompt in enumerate(prompts)
                for at, token in enumerate(prompt)
            ]
        )
        for step in range(steps):
            taken = [told.take(number, step, row) for number, row in enumerate(rows)]
            if step + 1 < steps:
                rows = self.run([(n, len(prompts[n]) + step, token, True) for n, token in enumerate(taken)])
        return told.answer()


class Server:
    """A model in llama.cpp's server, which xllamacpp starts on this machine."""

    def __init__(self, path: Path, widths: list[int], exact: bool) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = max(widths) * len(widths) + BATCH, len(widths), 0
        settings.port, settings.verbosity, settings.warmup, settings.fit_params = 0, -1, False, False
        self.server = xllamacpp.Server(settings)
        self.address = self.server.listening_address
        self.size: int | None = None
        self.plain = self.ids("a", special=False)[-1]

    def ask(self, where: str, entries: dict[str, Any]) -> dict[str, Any]:
        import http.client
        from urllib.parse import urlsplit

        line = http.client.HTTPConnection(urlsplit(self.address).netloc)
        line.request("POST", where, json.dumps(entries))
        answer = json.loads(line.getresponse().read())
        line.close()
        if "error" in answer:
            raise SystemExit(f"llama.cpp's server says {answer['error'].get('message', answer['error'])}")
        return answer

    def ids(self, string: str, special: bool = True) -> list[int]:
        """Tokenize a string with llama.cpp."""
        return self.ask("/tokenize", {"content": string, "add_special": special, "parse_special": False})["tokens"]

    def next(
        self, tokens: list[int], most: int, slot: int = 0, wanted: int | None = None
    ) -> tuple[float | None, list[tuple[int, Any]]]:
        """Return the log-probability of the token `wanted` after `tokens`, and the most likely tokens with theirs.

        The first is None if the server does not report it: the token's bytes are no whole character, or it ends a text. A
        bias makes the server take the token; log-probabilities are from before the bias.
        """
        token = self.plain if wanted is None else wanted
        entries = {
            "prompt": tokens,
            "n_predict": 1,
            "n_probs": most,
            "temperature": 0,
            "cache_prompt": True,
            "id_slot": slot,
            "logit_bias": [[token, CERTAIN]],
        }
        answer = self.ask("/completion", entries).get("completion_probabilities")
        if not answer and wanted is not None:
            return None, []
        if not answer or answer[0]["id"] != token:
            raise SystemExit(f"llama.cpp's server did not take token {token} in spite of its bias")
        return answer[0]["logprob"], [(each["id"], each["logprob"]) for each in answer[0]["top_logprobs"]]

    def row(self, tokens: list[int]) -> numpy.ndarray:
        """Return the log-probabilities of the whole vocabulary."""
        row = numpy.full(self.known(), -1e4, numpy.float32)
        for token, log in self.next(tokens, self.known())[1]:
            row[token] = max(log if log is not None else -1e4, -1e4)
        return row

    def said(self, text: list[int], rows: list[int]) -> tuple[list[float], list[numpy.ndarray]]:
        """As `Library.said`, with log-probabilities in place of logits."""
        logs: list[float] = []
        kept: list[numpy.ndarray] = []
        wanted = set(rows)
        for at in range(len(text)):
            if at in wanted:
                kept.append(self.row(text[: at + 1]))
            if at + 1 < len(text):
                log, _ = self.next(text[: at + 1], 1, wanted=text[at + 1])
                logs.append(float(self.row(text[: at + 1])[text[at + 1]]) if log is None else log)
        return logs, kept

    def known(self) -> int:
        """Return the size of the vocabulary."""
        if self.size is None:
            self.size = self.ask_for("/v1/models")["data"][0]["meta"]["n_vocab"]
        return self.size

    def ask_for(self, where: str) -> dict[str, Any]:
        import urllib.request

        with urllib.request.urlopen(self.address + where) as answer:
            return json.loads(answer.read())

    def going_on(self, prompts: list[list[int]], steps: int, forced: list[list[int]] | None) -> dict[str, Any]:
        """As `Library.going_on`; every prompt has its own slot of the server."""
        told = Told(len(prompts), forced)

        def one(number: int) -> None:
            tokens = list(prompts[number])
            for step in range(steps):
                (_, first), (second, other) = (most := self.next(tokens, 2, slot=number)[1])[:2]
                tokens.append(told.note(number, step, most[0][0], second, first - other))

        with ThreadPoolExecutor(len(prompts)) as threads:
            list(threads.map(one, range(len(prompts))))
        return told.answer()


class Told:
    """A record of every step's tokens. forced: tokens to take instead, [prompts, steps], or None."""

    def __init__(self, prompts: int, forced: list[list[int]] | None) -> None:
        self.forced = forced
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self.own: list[list[int]] = [[] for _ in range(prompts)]
        self.second: list[list[int]] = [[] for _ in range(prompts)]
        self.margins: list[list[float]] = [[] for _ in range(prompts)]

    def take(self, number: int, step: int, row: numpy.ndarray) -> int:
        """Record a step by its logits, and return the token to continue with."""
        second, first = numpy.argsort(row)[-2:].tolist() if len(row) > 1 else (0, 0)
        return self.note(number, step, first, second, float(row[first] - row[second]))

    def note(self, number: int, step: int, first: int, second: int, margin: float) -> int:
        self.own[number].append(first)
        self.second[number].append(second)
        self.margins[number].append(margin)
        self.tokens[number].append(first if self.forced is None else self.forced[number][step])
        return self.tokens[number][-1]

    def answer(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "own": self.own, "second": self.second, "margins": self.margins}


def print_error(text: bytes) -> None:
    print(text.decode(errors="replace"), end="", file=sys.stderr)


def log_softmax(row: numpy.ndarray) -> numpy.ndarray:
    row = row.astype(numpy.float64)
    row -= row.max()
    return row - numpy.log(numpy.exp(row).sum())


def version() -> str:
    """Return the package that runs llama.cpp, and its version."""
    import importlib.metadata

    package = "llama-cpp-python" if importlib.util.find_spec("llama_cpp") else "xllamacpp"
    return f"({package} {importlib.metadata.version(package)})"


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    files = sorted(Path(job["folder"]).glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{job['folder']} holds {len(files)} GGUF files; it should hold one")
    widths = [len(prompt) + job["steps"] for prompt in job["prompts"]] or [1]
    widths[0] = max(widths[0], *map(len, job["texts"]))
    kind = Library if importlib.util.find_spec("llama_cpp") else Server
    engine = kind(files[0], widths, job["dtype"] == "float32")
    print("# the texts", flush=True)
    answers = [engine.said(text, rows) for text, rows in zip(job["texts"], job["rows"], strict=True)]
    out = {"version": version(), "logprobs": [logs for logs, _ in answers], "checks": {}}
    if job.get("strings"):
        print("# the tokenizer", flush=True)
        out["ids"] = [engine.ids(string) for string in job["strings"]]
    if job["steps"]:
        print(f"# {job['steps']} tokens, {len(job['prompts'])} prompts in parallel", flush=True)
        out |= engine.going_on(job["prompts"], job["steps"], job["forced"])
    rows = [row for _, kept in answers for row in kept]
    numpy.save(Path(job["out"]) / "rows.npy", numpy.stack(rows) if rows else numpy.zeros((0, 0), numpy.float32))
    (Path(job["out"]) / "answer.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])

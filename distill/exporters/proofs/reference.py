"""The reference of a proof, as a plain script: the student itself, loaded by this project in float32.

`python reference.py JOB.json`. The jobs in `first` are run before the student, by transformers.py (`script`) in the same
process, which cannot import this project until they are done. With `along`, the path of an answer, the student gives the
most likely token at each step of that answer's tokens, from whole texts. Without it, the student generates its own tokens.
"""

import gc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def script(path: str | Path) -> Any:
    """Load a script of this folder as a module."""
    spec = importlib.util.spec_from_file_location("proof_in_transformers", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    engine = script(job["script"])
    for first in job["first"]:
        engine.main(first)
        gc.collect()
    if job["along"]:
        job["forced"] = json.loads(Path(job["along"]).read_text())["tokens"]
    print("# the student", flush=True)
    import torch

    import students

    model = engine.in_type(students.load(job["folder"], dtype=torch.float32), job["dtype"])
    out, rows = engine.answer(model, job)
    engine.write(job["out"], out | {"version": "", "class": type(model).__name__}, rows)


if __name__ == "__main__":
    main(sys.argv[1])

"""The peak of resident memory of a process that prepares one text file, starting from an empty cache.

Needs: FILE, a text file of any kind that `data.train` takes; TEACHER, a folder with a tokenizer. No GPU.
Ran on two busy CPU cores, 27 November 2026: LOG.md, "memory of preparing hostile text".
Usage: python docs/runs/memory_of_preparing.py FILE TEACHER
"""

import os
import resource
import sys
import tempfile


def main(file: str, teacher: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DISTILL_CACHE"] = cache
        from transformers import AutoTokenizer

        from distill.recipe import TextSource
        from distill.text.preparation import prepare

        tokenizer = AutoTokenizer.from_pretrained(teacher)
        folder = prepare([TextSource(path=file)], tokenizer, separator=None, seed=0, limit=None, where="data.train")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
        print((folder / "meta.json").read_text())  # the hash of the tokens


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/runs/memory_of_preparing.py FILE TEACHER")
    main(*sys.argv[1:])

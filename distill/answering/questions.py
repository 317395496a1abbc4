"""`distill questions`: writes public sets of questions with reference answers as chats.

A row is {"text"} with a question and its answer in one ("Q: ... A: ...", "Question: ... Answer: ..."), or has the two as
columns ({"question", "answer"}, as GSM8K). Each becomes {"messages": [user, assistant], "source"}. The result is a source of
text, and `distill answers --pairs` makes preference pairs from it.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from distill.answering.final_answers import final_answer
from distill.disk import check_writable, new_file
from distill.errors import UserError, brief, named
from distill.recipe import LONGEST_DOCUMENT, TextSource
from distill.text.chats import ASSISTANT, MESSAGES
from distill.text.files import files_of
from distill.text.json_file import entries
from distill.text.unpacked import Place

BEGIN = re.compile(r"\A\s*(?:Q|Question)\s*:\s*", re.IGNORECASE)
BORDER = re.compile(r"\n\s*(?:A|Answer)\s*:\s*", re.IGNORECASE)
SUMS = re.compile(r"<<[^<>\n]*>>")  # annotations for a calculator in GSM8K's answers
FILES = "FILES"


def write_questions(
    files: Sequence[str], out: str | Path, leave_out: Collection[str], ask: str | None
) -> dict[str, int | str]:
    """Write the questions of some files as chats; see `distill.questions`."""
    out = Path(out)
    check_writable(out, "--out")
    found: dict[str, int] = dict.fromkeys(("rows", "chats", "final_answers", "left_out", "no_question"), 0)
    words = {word.lower() for word in leave_out}
    seen: set[str] = set()
    with new_file(out) as opened:
        for number, path in enumerate(files):
            for file in files_of(TextSource(path=path), f"{FILES}.{number}"):
                if file.kind != "json":
                    raise UserError(f"{named(file.path)} holds no JSON, and questions are read from JSON lines; name others")
                for label, record, place in _records(file.path, file.label):
                    found["rows"] += 1
                    marks = set(re.split(r"[^a-z0-9]+", f"{label} {record.get('id', '')}".lower()))
                    seen |= marks & words
                    if marks & words:
                        found["left_out"] += 1
                        continue
                    pair = _split(record, f"{named(file.path)}, {place}")
                    if pair is None:
                        found["no_question"] += 1
                        continue
                    asked = pair[0] if ask is None else f"{pair[0]}\n{ask}"
                    turns = [
                        {"role": role, "content": text}
                        for role, text in zip(("user", ASSISTANT), (asked, pair[1]), strict=True)
                    ]
                    found["chats"] += 1
                    found["final_answers"] += final_answer(pair[1]) is not None
                    row = {MESSAGES: turns, "source": label}
                    opened.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
        if missing := words - seen:
            raise UserError(
                f"--leave-out is {min(missing)}, but no row's id or source has that word; see how the files name it"
            )
        if not found["chats"]:
            raise UserError(f"{', '.join(map(named, files))}: no row holds a question and its answer; nothing is written")
    return found | {"file": str(out)}


def _records(path: str, label: str) -> Iterator[tuple[str, Mapping, Place]]:
    """Each record with its source's name and its place. The name is the column `source`, else the beginning of the id, else
    the file's label."""
    place = Place()
    for record in entries(path, FILES, LONGEST_DOCUMENT, place):
        known = record.get("source") or str(record.get("id", "")).rpartition("/")[0] or label
        yield str(known), record, place


def _split(record: Mapping, place: str) -> tuple[str, str] | None:
    """A row's question and its answer; None where it holds none."""
    if "question" in record:
        question, answer = record["question"], record.get("answer")
    else:
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(
                f"{place}: it has {', '.join(map(str, record)) or 'nothing'}; it needs question and answer, or a text"
            )
        begun, border = BEGIN.match(text), BORDER.search(text)
        if begun is None or border is None:
            return None
        question, answer = text[begun.end() : border.start()], text[border.end() :]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{place}: question is {brief(question)} and answer {brief(answer)}; both should be text")
    question, answer = question.strip(), SUMS.sub("", answer).strip()
    return (question, answer) if question and answer else None

"""The portable target: a folder that transformers loads with `trust_remote_code=True`, without this project installed.

The folder holds the student's config and its weights. The weights are bfloat16 by default; those that decay the states are
float32, because transformers keeps them so in any type. The modelling code is the files of `students/` in one flat folder:
every `from students.a.b import c` becomes `from .students_a_b import c`, and the shape annotations become plain `object`s.
So only torch and transformers are needed. Triton kernels are included, and imported only if Triton is installed and a GPU
uses them. One small file defines the family's classes for `auto_map`.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from distill.exporters.engines import ENGINES
from distill.exporters.target import Form, Target
from distill.reading import read_json
from distill.runs.records import Record

if TYPE_CHECKING:
    import torch

    from distill.exporters.source import Source

CODE = "modeling_distill"
FIX = "delete it, and the same `distill run` saves the student again"
IMPORT = re.compile(r"^([ \t]*)from (students[\w.]*) import ", re.MULTILINE)
TARGET = re.compile(r'"(students[\w.]*):')  # an entry of a table of classes
KERNEL = re.compile(r'Deferred\("(students[\w.]*)", "(\w+)"\)')
MODULE_IMPORT = re.compile(r"^from (students[\w.]*) import (\w+)$", re.MULTILINE)  # imports a module if a file has that name
TRITON = re.compile(r"^import triton\nimport triton\.language as tl$", re.MULTILINE)
FLAT_TARGET = re.compile(r'"\.(students\w*):(\w+)"')

SHAPES = '''"""Shape annotations, unchecked here: `Float[Tensor, "b t d"]` is any object."""


class _Anything:
    def __class_getitem__(cls, item):
        return object


Bool = Float = Int = _Anything
'''

GUARDED = """try:  # transformers refuses to load a folder whose plain imports are not installed
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it the references run") from error"""

ENTRY = '''"""The classes that config.json's auto_map names; made from transformers' {family} classes."""

from .students_model import student_class
{imports}

{model} = student_class("{family}")
{config} = {model}.config_class
for each in ({model}, {config}):  # `save_pretrained` copies the file that a class's `__module__` names; pickle imports it
    each.__module__, each.__qualname__ = __name__, each.__name__
'''


class Config(Record):
    """The entries that are read from a student's config.json."""

    model_type: Annotated[str, Field(pattern=r"^distill_\w+$")]


class Portable(Target):
    """The portable target, which holds every layout."""

    line = "a folder that transformers loads with trust_remote_code, without this project"
    remote_code = True

    def engines(self, source: "Source") -> dict[str, str | None]:
        why = "it does not run code that comes with a model"
        return {engine: None if engine == "transformers" else why for engine in ENGINES}

    def write(self, student: Path, out: Path, form: Form) -> None:
        from distill.exporters.weights import write_cast
        from distill.stages import adapters

        config = read_json(student / "config.json", TypeAdapter(Config), fix=FIX)
        family = config["model_type"].removeprefix("distill_")
        adapted = (student / adapters.CONFIG).exists()
        shutil.copytree(student, out, ignore=None if adapted else shutil.ignore_patterns("*.safetensors"))
        adapters.merge_saved(out)
        config["dtype"] = form.dtype
        write_cast(out if adapted else student, out, _types(student, form))
        modules = flattened()
        for name, text in modules.items():
            (out / name).write_text(text)
        names = _entry(out, family, modules)
        config["auto_map"] = {
            "AutoConfig": f"{CODE}.{names['config']}",
            "AutoModelForCausalLM": f"{CODE}.{names['model']}",
        }
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _types(student: Path, form: Form) -> "Callable[[str], torch.dtype]":
    """Return the type of a weight by name: the form's, or float32 where transformers keeps float32 in any type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.compat import kept_in_float32

    with torch.device("meta"):
        kept = kept_in_float32(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student)))
    kind = getattr(torch, form.dtype)
    return lambda name: torch.float32 if any(f".{part}." in f".{name}." for part in kept) else kind


def _entry(target: Path, family: str, modules: dict[str, str]) -> dict[str, str]:
    """Write the file that `auto_map` names. Returns the names of its classes."""
    from students.model import student_class

    model = student_class(family)
    names = {"model": model.__name__, "config": model.config_class.__name__}
    tables = sorted({found for text in modules.values() for found in FLAT_TARGET.findall(text)})
    imports = "\n".join(f"from .{module} import {attribute}  # noqa: F401" for module, attribute in tables)
    (target / f"{CODE}.py").write_text(ENTRY.format(family=family, imports=imports, **names))
    return names


def flattened() -> dict[str, str]:
    """Return the files of `students/` that a model needs, by flat file name, with relative imports."""
    files = {"students.shapes": SHAPES}
    waiting = ["students.model"]
    while waiting:
        module = waiting.pop()
        if module in files:
            continue
        source, needed = _flat_source(_source_of(module))
        waiting += needed
        files[module] = source
    return {f"{_flat(module)}.py": text for module, text in files.items()}


def _flat_source(source: str) -> tuple[str, list[str]]:
    """Rewrite a source file for a flat folder. Returns the text and the modules that it needs."""
    late = [f"{package}.{name}" for package, name in MODULE_IMPORT.findall(source) if _is_module(f"{package}.{name}")]
    for module in late:
        package, _, name = module.rpartition(".")
        source = source.replace(f"from {package} import {name}\n", f"from . import {_flat(module)} as {name}\n")
    late += [module for module, _ in KERNEL.findall(source)]
    needed = late + [match[2] for match in IMPORT.finditer(source)] + TARGET.findall(source)
    source = IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import ", source)
    source = TARGET.sub(lambda match: f'".{_flat(match[1])}:', source)
    source = KERNEL.sub(lambda match: f'Deferred(".{_flat(match[1])}", "{match[2]}", __package__)', source)
    source = TRITON.sub(GUARDED, source)
    for module in sorted(set(late)):  # transformers copies the files that it finds in import statements
        source += f"\nif False:\n    from .{_flat(module)} import *  # noqa\n"
    return source, needed


def _is_module(name: str) -> bool:
    return _home().joinpath(*name.split(".")[1:]).with_suffix(".py").is_file()


def _source_of(module: str) -> str:
    path = _home().joinpath(*module.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _home() -> Path:
    """The folder of the package `students`."""
    import students

    return Path(students.__file__).parent

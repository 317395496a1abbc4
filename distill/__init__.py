"""Turn pretrained Transformers into state-space hybrids by distillation.

The Python API has one function for each verb of the command line: `distill.plan(recipe)`, `distill.prepare(recipe)`,
`distill.questions(files, out=file)`, `distill.answers(recipe)`, `distill.run(recipe)`, `distill.cache(recipe)`,
`distill.select(recipe)`, `distill.evaluate(run)`, `distill.report(run)`, `distill.export(run, out=folder)`,
`distill.generate(run, prompt)`, `distill.doctor()` and `distill.bench()`. For the shipped recipes there are
`distill.recipes()`, `distill.recipe_text(name)` and `distill.copy_recipe(name)`. `distill.recipe_schema()` returns the
JSON schema of recipes.
"""

from distill.api import (
    evaluate,
    export,
    generate,
    plan,
    report,
    run,
    select,
)
from distill.beforehand import answers, cache, copy_recipe, prepare, questions, recipe_schema, recipe_text, recipes
from distill.errors import Interrupted, UserError
from distill.machine import bench, doctor
from distill.version import __version__

__all__ = [
    "Interrupted",
    "UserError",
    "__version__",
    "answers",
    "bench",
    "cache",
    "copy_recipe",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "plan",
    "prepare",
    "questions",
    "recipe_schema",
    "recipe_text",
    "recipes",
    "report",
    "run",
    "select",
]

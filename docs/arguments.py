"""How docstrings are read for the API page: several arguments or errors in a line become one entry each.

Docstrings stay short (`Args: recipe, overrides: as in ... fresh: throw away ...`). The page lists every argument.
"""

import re

from griffe import Extension

SECTION = re.compile(r"^(Args|Raises):[ \n](.*?)(?=^\w|\Z)", re.S | re.M)
ENTRY = re.compile(r"(?:^|(?<=[.;] ))([\w, `]+): ")


class OneEach(Extension):
    """Rewrites the sections Args and Raises of a function's docstring while it is read; the files stay as they are."""

    def on_function_instance(self, *, func, **_):
        """func: the function that was read; its docstring is changed in place."""
        _rewrite(func.docstring, func.parameters)

    def on_class_members(self, *, cls, **_):
        """cls: the class that was read with its members; its docstring has the arguments of __init__."""
        if "__init__" in cls.members:
            _rewrite(cls.docstring, cls.members["__init__"].parameters)


def _rewrite(docstring, parameters):
    """One entry for each argument in a docstring, if there is any."""
    arguments = {parameter.name for parameter in parameters}

    def known(title, name):
        return name in arguments if title == "Args" else name[:1].isupper()

    if docstring:
        docstring.value = SECTION.sub(lambda found: _listed(*found.groups(), known), docstring.value)


def _listed(title, text, known):
    """The section with one entry for each known name that it describes; what stands before the first is prose."""
    prose, *parts = ENTRY.split(" ".join(text.split()))
    groups = []  # names, and what is said of them
    for named, said in zip(parts[::2], parts[1::2], strict=True):
        names = [name.strip(" `") for name in named.split(",")]
        if all(known(title, name) for name in names):
            groups.append((names, said.strip()))
        elif groups:  # a colon inside a sentence
            groups[-1] = (groups[-1][0], f"{groups[-1][1]} {named}: {said.strip()}")
        else:
            prose += f"{named}: {said}"
    entries = [f"    {name}: {said}" for names, said in groups for name in names]
    section = f"{title}:\n" + "\n".join(entries) if entries else ""
    return "\n\n".join(part for part in (prose[:1].upper() + prose[1:].strip(), section) if part) + "\n\n"

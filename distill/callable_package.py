"""Packages named for a verb: `distill.evaluate` holds modules and, called, evaluates."""

import sys
from types import ModuleType


class CallablePackage(ModuleType):
    """A module whose call is the call of the function in it that has its own name."""

    def __call__(self, *arguments, **keywords):
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **keywords)


def make_callable(module_name: str) -> None:
    """Make an imported module callable."""
    sys.modules[module_name].__class__ = CallablePackage

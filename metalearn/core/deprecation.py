"""Former names of settings and methods: they still work, and warn."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def renamed(**new_names: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass be used with the former names of its fields, properties and methods, given as ``former="new"``.

    A former name is accepted as a keyword argument, also by ``dataclasses.replace``, and as an attribute. Each use
    emits a ``FutureWarning`` that names the new one. Both names of one field in a call raise a ``TypeError``.
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Callable[..., None] = cls.__init__

        @functools.wraps(init)
        def init_with_former_names(self: T, *args: Any, **kwargs: Any) -> None:
            fields = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
            is_replacing = fields <= kwargs.keys()  # dataclasses.replace passes every field: the new name's old value
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs and not is_replacing:
                    raise TypeError(f"{cls.__name__}() got {new}= and its former name {old}=; give {new}= alone")
                warn_renamed(f"{cls.__name__}({old}=...)", f"{new}=", stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            init(self, *args, **kwargs)

        setattr(cls, "__init__", init_with_former_names)  # noqa: B010  # mypy refuses the plain assignment
        for old, new in new_names.items():
            setattr(cls, old, _alias(cls.__name__, old, new))
        return cls

    return decorate


def _alias(owner: str, old: str, new: str) -> property:
    def get(self: object) -> Any:
        warn_renamed(f"{owner}.{old}", new, stacklevel=2)
        return getattr(self, new)

    return property(get)


def adopt_former_methods(cls: type, new_names: Mapping[str, str]) -> None:
    """Give a user's class the new names of methods that it defines under former ones, with one warning for each.

    A class without any of them, which does not implement the interface, is left alone.
    """
    if not any(hasattr(cls, name) for names in new_names.items() for name in names if not name.startswith("__")):
        return
    for old, new in new_names.items():
        definer = next((base for base in cls.__mro__ if {old, new} & vars(base).keys()), None)
        if definer is not None and new not in vars(definer):
            warn_renamed(f"the method {old} of {cls.__name__}", new, stacklevel=3)
            setattr(cls, new, vars(definer)[old])


def add_former_methods(cls: type, new_names: Mapping[str, str]) -> None:
    """Let the methods that a class defines be called by their former names as well, with a warning."""
    for old, new in new_names.items():
        if new in vars(cls) and old not in vars(cls):
            setattr(cls, old, _former_method(f"{cls.__name__}.{old}", new, vars(cls)[new]))


def _former_method(old: str, new: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        warn_renamed(old, new, stacklevel=2)
        return method(*args, **kwargs)

    return call


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warn that a name is a former one; ``stacklevel`` counts from the caller."""
    warnings.warn(f"{old} is called {new} now", FutureWarning, stacklevel=stacklevel + 1)

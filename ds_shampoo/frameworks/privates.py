"""Names that a host framework does not document: what each is, and whether the installed release still has it so."""

from __future__ import annotations

import abc
import dis
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True)
class Private(abc.ABC):
    """One such name.

    Attributes:
        owner: the class, function or module that has it, by its dotted path; of what is set on objects, the one whose
            code sets it.
        name: the name.
        since: the first release that has it; those before do without.
    """

    owner: str
    name: str
    since: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.owner.rpartition('.')[2]}.{self.name}"

    def fault(self) -> str:
        """What is wrong with it in the installed release, as a sentence's end; empty where nothing is."""
        try:
            owner = resolve(self.owner)
        except LookupError:
            return f"there is no {self.owner}"
        return self._fault(owner)

    @abc.abstractmethod
    def _fault(self, owner: Any) -> str: ...


@dataclass(frozen=True)
class Given(Private):
    """An attribute that the owner's code sets, on its own instances or on what it is handed."""

    def _fault(self, owner: Any) -> str:
        return "" if any(_sets(code, self.name) for code in codes(owner)) else f"nothing in {self.owner} sets it"


@dataclass(frozen=True)
class Method(Private):
    """A method of the owner's, called with so many positional arguments and these named ones.

    What is replaced and called with whatever the framework passes has `passed_on` set, and no arguments.
    """

    positional: int = 0
    named: tuple[str, ...] = ()
    passed_on: bool = False

    def _fault(self, owner: Any) -> str:
        found = getattr(owner, self.name, None)
        if not callable(found):
            return "there is no such method"
        return "" if self.passed_on else _call_fault(found, 1 + self.positional, self.named)


@dataclass(frozen=True)
class Function(Private):
    """A function of the owner's, a module, called with so many positional arguments and these named ones."""

    positional: int = 0
    named: tuple[str, ...] = ()

    def _fault(self, owner: Any) -> str:
        found = getattr(owner, self.name, None)
        return _call_fault(found, self.positional, self.named) if callable(found) else "there is no such function"


@dataclass(frozen=True)
class Mark(Private):
    """An attribute that the owner's code writes on a parameter by `setattr`."""

    def _fault(self, owner: Any) -> str:
        written = any("setattr" in code.co_names and self.name in code.co_consts for code in codes(owner))
        return "" if written else f"nothing in {self.owner} writes it"


@dataclass(frozen=True)
class Quoted(Private):
    """A name that the owner's code has as a string: a key of what it gives, or an attribute that it asks for."""

    def _fault(self, owner: Any) -> str:
        said = any(self.name in _flat(code.co_consts) for code in codes(owner))
        return "" if said else f"nothing in {self.owner} has that name"


@dataclass(frozen=True)
class Field(Private):
    """A setting of the owner's, a configuration."""

    def _fault(self, owner: Any) -> str:
        known = is_dataclass(owner) and self.name in {field.name for field in fields(owner)}
        return "" if known else "there is no such setting"


@dataclass(frozen=True)
class Entry(Private):
    """What a module has under the name, of the type `kind`."""

    kind: type = object

    def _fault(self, owner: Any) -> str:
        if not hasattr(owner, self.name):
            return "there is no such thing"
        found = getattr(owner, self.name)
        return "" if isinstance(found, self.kind) else f"it is a {type(found).__name__}, not a {self.kind.__name__}"


def faults(names: Iterable[Private], release: tuple[int, ...]) -> list[str]:
    """What a release, in which they are looked for, does not have as it should; one line each."""
    expected = [name for name in names if name.since <= release]
    return [f"{name} ({fault})" for name in expected if (fault := name.fault())]


def resolve(path: str) -> Any:
    """What a dotted path leads to.

    Raises:
        LookupError: if it leads nowhere.
    """
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                raise
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                raise LookupError(path)
            found = getattr(found, part)
        return found
    raise LookupError(path)


def functions(owner: Any) -> Iterator[FunctionType]:
    """The functions of a class and of its bases of the same package; those of a module; or one itself.

    Where a decorator stands around one, that which it decorates is among them.
    """
    if isinstance(owner, ModuleType):
        own = [member for member in vars(owner).values() if getattr(member, "__module__", "") == owner.__name__]
        yield from (function for member in own for function in _unwrapped(member))
        return
    if not isinstance(owner, type):
        yield from _unwrapped(owner)
        return
    package = owner.__module__.partition(".")[0]
    for base in owner.__mro__:
        if base.__module__.partition(".")[0] == package:
            for member in vars(base).values():
                yield from _unwrapped(member)


def codes(owner: Any) -> Iterator[CodeType]:
    """All code of `functions`, and that of the functions within them."""
    waiting = [function.__code__ for function in functions(owner)]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _call_fault(called: Callable[..., Any], positional: int, named: Iterable[str]) -> str:
    signature = inspect.signature(called)
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(named))
    except TypeError as error:
        return f"it takes {signature}: {error}"
    return ""


def _flat(constants: Iterable[Any]) -> Iterator[Any]:
    for constant in constants:
        yield from _flat(constant) if isinstance(constant, tuple) else (constant,)


def _unwrapped(member: Any) -> Iterator[FunctionType]:
    if isinstance(member, property):
        accessors: list[Callable[..., Any] | None] = [member.fget, member.fset]
    else:
        accessors = [getattr(member, "__func__", member)]
    for function in accessors:
        if isinstance(function, FunctionType):
            yield function
            yield from (
                found for cell in function.__closure__ or () if isinstance(found := _content(cell), FunctionType)
            )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _sets(code: CodeType, name: str) -> bool:
    return name in code.co_names and any(
        instruction.opname == "STORE_ATTR" and instruction.argval == name for instruction in dis.get_instructions(code)
    )

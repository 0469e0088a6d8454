"""What a code object computes, whatever file and line it stands in, and which names it asks for."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CellType, CodeType
from typing import Any, NamedTuple

_SAID_BY_PLACE = frozenset(
    {"__name__", "__file__", "__spec__", "__loader__", "__package__", "__path__", "__doc__"}
)
_BY_TEXT = frozenset({"getattr", "attrgetter", "vars", "globals", "__dict__"})
_IMPORTING = frozenset({"import_module", "__import__"})
_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})
_FLAGS = 0xFFF  # kind of function; further bits say what the file imported from __future__


class Names(NamedTuple):
    """Names in a code object and those nested in it."""

    globals: frozenset[str]  # looked up among the globals of its module
    imports: frozenset[str]  # modules that it imports when it runs
    others: frozenset[str]  # attributes, also of modules
    texts: frozenset[str] = frozenset()  # constants

    @property
    def reads_environment(self) -> bool:
        """Whether variables of the environment are asked for; their names may be among ``texts``."""
        return not _ENVIRONMENT.isdisjoint(self.globals | self.others)

    @property
    def spelt(self) -> Names:
        """The same, with what may be looked up by constants: ``getattr(module, "name")``, ``globals()["name"]``."""
        if _BY_TEXT.isdisjoint(self.globals | self.others):
            return self
        parts = frozenset(part for text in self.texts for part in text.split(".") if part.isidentifier())
        more = parts - _SAID_BY_PLACE if "globals" in self.globals else frozenset[str]()
        return self._replace(globals=self.globals | more, others=self.others | parts)


def parts(code: CodeType) -> Iterator[bytes]:
    """Instructions, signature and names, without the constants."""
    arguments = code.co_argcount + code.co_kwonlyargcount
    arguments += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    yield code.co_code
    yield code.co_exceptiontable
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAGS)
    yield repr(
        (counts, code.co_varnames[:arguments], code.co_names, code.co_freevars, code.co_cellvars)
    ).encode()


def constants(code: CodeType) -> tuple[Any, ...]:
    """Its constants. Since Python 3.13 the body of a class holds its line number, which is left out."""
    if "__firstlineno__" not in code.co_names:
        return code.co_consts
    return tuple(c for c in code.co_consts if type(c) is not int or c != code.co_firstlineno)


@lru_cache(maxsize=4096)
def names(code: CodeType) -> Names:
    """The names that ``code`` and the code nested in it ask for."""
    found, imports, texts = set[str](), set[str](), set[str]()
    before: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "DELETE_GLOBAL"):
            found.add(str(instruction.argval))
        elif instruction.opname == "LOAD_CONST" and before in _IMPORTING and type(instruction.argval) is str:
            imports.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imports.add(str(instruction.argval))
        before = before if instruction.opname in ("PUSH_NULL", "CACHE") else instruction.argval
    others = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str | bytes):
            texts.add(constant if isinstance(constant, str) else constant.decode("utf-8", "replace"))
        elif isinstance(constant, tuple):
            texts |= {text for text in constant if isinstance(text, str)}
        elif isinstance(constant, CodeType):
            inner = names(constant)
            found, imports = found | inner.globals, imports | inner.imports
            others, texts = others | inner.others, texts | inner.texts
    return Names(*map(frozenset, (found - _SAID_BY_PLACE, imports, others, texts)))


def is_filled(cell: CellType) -> bool:
    """Whether a closure's variable has a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True

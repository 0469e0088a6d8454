"""The digest of code and values: another for each edit that changes what is computed, the same in every process."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from clients.base import Client
from fedsim.config.code import Reader, digest
from fedsim.config.usermodules import is_users
from fedsim.errors import ConfigError

HEAD = """
import dataclasses, enum, functools, logging, threading
import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from clients.base import Client
log, lock = logging.getLogger("mine"), threading.Lock()
"""
NET = """
class Net(nn.Module):
    def __init__(self, h=3, act=nn.Tanh):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, h), act(), nn.Linear(h, 2))
    def forward(self, x):
        return self.layers(x)
"""
MAKE = """
def make(a, b=1):
    def inner(o, y):
        with lock:
            log.debug("once")
            return a * F.cross_entropy(o, y) + b
    return inner
"""
CLASS = """
class Base(Client):
    rate = 0.1
    def step(self, job, w, batch):
        return w - self.rate * job.grad(w, batch)
    @property
    def twice(self): return 2 * self.rate
    @staticmethod
    def plain(x): return x + 1
    @classmethod
    def made(cls): return cls()
class Mine(Base):
    table = {"a", "b", "c", "d"}
    def finish(self, job, w):
        return [v * 2 for v in super().finish(job, w) if v not in {"x", "y", "z"}]
thing = Mine
"""
WRAP = """
def twice(times):
    def wrap(f):
        @functools.wraps(f)
        def inner(*a): return times * f(*a)
        return inner
    return wrap
@twice(2)
@torch.no_grad()
def thing(o, y): return (o - y).abs()
"""
GLOBALS = """
RATE, WEIGHTS = 0.5, np.arange(3.0)
def helper(x): return x * RATE
def other(x): return x
def thing(o, y): return helper(o - y) * WEIGHTS.sum()
"""
DATA = """
@dataclasses.dataclass(frozen=True)
class Mine(Client):
    rho: float = 0.1
    sizes: list = dataclasses.field(default_factory=lambda: [1, 2])
class Kind(enum.Enum):
    A = 1
    B = 2
thing = (Mine(), Kind.A)
"""
CALLS = """
class Loss:
    def __init__(self, a): self.a, self.parts = a, {"k": [1, 2.5]}
    def __call__(self, o, y): return self.a * F.mse_loss(o, y)
    def method(self, o, y): return self(o, y)
@functools.lru_cache
def cached(n): return n + 1
def thing(o, y): return cached(3) * o
"""
LOOP = """
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
class Node:
    def make(self): return Node()
    me = None
Node.me = Node
thing = [even, Node]
thing.append(thing)
"""

PAIRS = {  # the code, what is replaced in it, and by what
    "closure of a lambda": (NET + "h = 3\nthing = (lambda h: lambda: Net(h))(3)", "(3)", "(4)"),
    "closure of a function": (MAKE + "thing = make(0.9)", "0.9", "0.8"),
    "tensor in a closure": (MAKE + "thing = make(torch.arange(1e5))", "1e5)", "1e5).flip(0)"),
    "array in a closure": (MAKE + "thing = make(np.arange(9))", "9)", "9)[::-1]"),
    "default": (MAKE + "thing = make", "b=1", "b=2"),
    "keyword default": ("def thing(o, y, *, b=1): return b", "b=1", "b=2"),
    "constant": (MAKE + "thing = make(1)", "+ b", "+ b + 1"),
    "nested constant": (CLASS, "v * 2", "v * 3"),
    "frozen set": (CLASS, '"z"}', '"q"}'),
    "called name": ("def thing(o, y): return F.mse_loss(o, y)", "mse", "l1"),
    "class attribute": (CLASS, "rate = 0.1", "rate = 0.2"),
    "set in a class": (CLASS, '"d"}', '"e"}'),
    "method of a base": (CLASS, "w - self", "w + self"),
    "property": (CLASS, "2 * self.rate", "3 * self.rate"),
    "static method": (CLASS, "x + 1", "x + 2"),
    "class method": (CLASS, "return cls()", "return cls"),
    "base": (CLASS, "class Mine(Base)", "class Mine(Client)"),
    "added method": (CLASS, "thing =", "Mine.begin = lambda self, job, w: w\nthing ="),
    "decorator's argument": (WRAP, "@twice(2)", "@twice(3)"),
    "decorated function": (WRAP, "(o - y)", "(y - o)"),
    "somebody else's decorator": (WRAP, "no_grad", "enable_grad"),
    "value of a global": (GLOBALS, "0.5", "0.4"),
    "array as a global": (GLOBALS, "3.0", "4.0"),
    "function as a global": (GLOBALS, "return x * RATE", "return x + RATE"),
    "dataclass field": (DATA, "0.1", "0.2"),
    "default factory": (DATA, "[1, 2]", "[1, 3]"),
    "member of an enum": (DATA, "Kind.A)", "Kind.B)"),
    "callable object": (CALLS + "thing = Loss(1)", "self.a *", "self.a +"),
    "attribute of an object": (CALLS + "thing = Loss(1)", "2.5", "2.25"),
    "type of a number": (CALLS + "thing = Loss(1)", "Loss(1)", "Loss(True)"),
    "bound method": (CALLS + "thing = Loss(1).method", "Loss(1)", "Loss(2)"),
    "partial": (MAKE + "thing = functools.partial(make(1), y=2)", "y=2", "y=3"),
    "cached function": (CALLS, "n + 1", "n + 2"),
    "recursive functions": (LOOP, "n == 0", "n == 1"),
    "method in a circle": (LOOP, "return Node()", "return None"),
    "activation": (NET + "thing = Net()", "nn.Tanh", "nn.ReLU"),
    "its setting": (NET + "thing = Net(act=nn.LeakyReLU)", "act=nn.LeakyReLU", "act=lambda: nn.LeakyReLU(0.2)"),
    "forward": (NET + "thing = Net()", "self.layers(x)", "-self.layers(x)"),
    "weights": (NET + "thing = Net()", "seed(0)", "seed(1)"),
    "mode of a layer": (NET + "thing = Net(); 0", "; 0", "; thing.layers[0].eval()"),
    "frozen parameter": (NET + "thing = Net(); 0", "; 0", "; thing.layers[0].weight.requires_grad_(False)"),
    "attribute of a module": (NET + "thing = Net(); thing.scale = 1", "= 1", "= 2"),
    "hook": (NET + "thing = Net(); 0", "; 0", "; thing.register_forward_hook(lambda m, i, o: 2 * o)"),
    "tied weights": (NET + "thing = Net(2); a = thing.layers[0]; b = thing.layers[2]\nwith torch.no_grad(): "
                     "b.weight.copy_(a.weight)\n0", "\n0", "\nb.weight = a.weight"),
    "order of layers": ("thing = nn.Sequential(nn.Tanh(), nn.ReLU())", "nn.Tanh(), nn.ReLU()", "nn.ReLU(), nn.Tanh()"),
    "class made by torch": ("class Layer(nn.Linear):\n    def extra(self): return 1\ntorch.manual_seed(0)\n"
        "thing = nn.utils.parametrizations.orthogonal(Layer(2, 2))", "return 1", "return 2"),
    "recurrent": ("torch.manual_seed(0); thing = nn.LSTM(2, 3)", "3)", "3, bidirectional=True)"),
}  # fmt: skip


def made(source: str) -> Any:
    """``thing`` of the source, run as a notebook runs a cell: there is no file."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(HEAD + source, "<cell>", "exec", dont_inherit=True), space)
    return space["thing"]


@pytest.mark.parametrize("name", PAIRS)
def test_an_edit_gives_another_digest_and_the_same_code_the_same(name: str) -> None:
    source, old, new = PAIRS[name]
    assert old in source
    head, _, tail = source.rpartition(old)
    edited = head + new + tail
    here = digest("thing", made(source))
    assert digest("thing", made(edited)) != here
    assert digest("thing", made("\n# a comment\n\n" + source)) == here


def test_another_process_and_another_place_give_the_same_digests(tmp_path: Path) -> None:
    """As files that are imported, under other hash seeds; here they are cells of a notebook."""
    for at, (source, *_) in enumerate(PAIRS.values()):
        (tmp_path / f"mine{at}.py").write_text("#\n" * at + HEAD + source)
    code = (
        "import importlib, json, sys; from fedsim.config.code import digest;"
        f"print(json.dumps([digest('', importlib.import_module(f'mine{{i}}').thing) for i in range({len(PAIRS)})]))"
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "12"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = [digest("", made(source)) for source, *_ in PAIRS.values()]
    assert dict(zip(PAIRS, json.loads(run.stdout), strict=True)) == dict(zip(PAIRS, here, strict=True))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of the user's beside the one that uses it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside.py").write_text("scale = 2\nunused = 3\ndef f(x): return x * scale\n")
    import beside

    yield beside
    del sys.modules["beside"]


@pytest.mark.parametrize(
    "source",
    [
        "import beside\ndef thing(x): return beside.f(x)",
        "from beside import f\ndef thing(x): return f(x)",
        "def thing(x):\n    import beside\n    return beside.f(x)",
        "def thing(x):\n    from beside import f\n    return f(x)",
        "def make():\n    import beside\n    return lambda x: beside.f(x)\nthing = make()",
        "import beside as m\ndef thing(x, m=m): return m.f(x)",
        "import beside\nkinds = {'a': beside}\ndef thing(x): return kinds['a'].f(x)",
    ],
)
def test_what_a_module_beside_holds_counts_if_it_is_named(module: ModuleType, source: str) -> None:
    here = digest("", made(source))
    module.unused = 4
    assert digest("", made(source)) == here
    module.scale = 5
    assert digest("", made(source)) != here


def test_a_class_patched_in_the_process_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(NET + "thing = Net()")
    here, ours = digest("", net), digest("", Client)
    monkeypatch.setattr(type(net), "forward", lambda self, x: x)
    assert digest("", net) != here
    monkeypatch.setattr(Client, "finish", lambda self, job, w: None)
    reader = Reader("")
    assert reader.read(Client) != ours and list(reader.patched) == ["clients.base.Client.finish"]


def test_copies_of_its_objects_leave_a_class_what_it_is() -> None:
    class Mine(Client):
        def finish(self, job: Any, w: Any) -> Any:
            return w

    before = digest("", Mine)
    copy.copy(Mine())
    assert "__slotnames__" in vars(Mine) and digest("", Mine) == before


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (lambda held: made(MAKE + "thing = make")([held]), "closure variable 'a' of make.<locals>.inner"),
        (lambda held: type("Mine", (Client,), {"held": held}), "attribute 'held' of Mine"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(thing: Any, said: str) -> None:
    with socket.socket() as held, pytest.raises(ConfigError) as refused:
        digest("loss", thing(held))
    assert f"loss: socket.socket ({said}) cannot be told apart by content" in str(refused.value)


def test_others_code_is_known_by_name_and_quickly() -> None:
    assert is_users(__name__) and is_users("never_loaded") and is_users("__main__")
    assert not any(
        map(is_users, ("torch.nn", "fedsim.rng", "clients.base", "json", "builtins", "hydra.utils"))
    )
    layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()] * 20
    start = time.perf_counter()
    digest("", [nn.Sequential(*layers), made(MAKE + "thing = make(1)"), made(CLASS)])
    assert time.perf_counter() - start < 0.5, "about 10 ms on an idle machine"
    assert digest("", nn.functional.cross_entropy) == digest("", torch.nn.functional.cross_entropy)

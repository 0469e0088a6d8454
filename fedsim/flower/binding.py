"""Which registered key may be which clients: ``engine.nodes``, or a file that says the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedsim.config.yamlfile import read_yaml
from fedsim.errors import ConfigError, hint

EXAMPLE = "engine.nodes={hospital0: [0], hospital1: [1, 2]}"


@dataclass(frozen=True)
class Binding:
    """``clients`` of each name under which a key was registered (``flwr supernode register --name``); empty: no key is
    bound, and whoever reaches the link may be any client."""

    clients: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @staticmethod
    def of(given: Any, num_clients: int) -> Binding:
        """From ``engine.nodes``: nothing, a mapping, or the path of a YAML file that holds one.

        Raises:
            ConfigError: for a file that cannot be read, a client that does not exist, or one that two keys may be.
        """
        if given is None:
            return Binding()
        where = "engine.nodes"
        if isinstance(given, str):
            where, given = f"engine.nodes={given}", _read(given) if given.strip() else None
        if not isinstance(given, Mapping) or not given:
            raise ConfigError(f"{where}: expected names with their clients, such as {EXAMPLE}")
        found, owner = dict[str, frozenset[int]](), dict[int, str]()
        for name, value in given.items():
            if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
                raise ConfigError(f"{where}: {name!r} is no name of a key, such as hospital0")
            numbers = [value] if type(value) is int else value
            if (
                not isinstance(numbers, list | tuple)
                or not all(type(c) is int for c in numbers)
                or not numbers
            ):
                raise ConfigError(f"{where}: {name}: {value}: expected clients, such as {EXAMPLE}")
            for client in numbers:
                if not 0 <= client < num_clients:
                    raise ConfigError(f"{where}: {name}: client {client}: the run has {num_clients} clients")
                if owner.setdefault(client, str(name)) != str(name):
                    raise ConfigError(f"{where}: client {client} is bound to {owner[client]} and to {name}")
            found[str(name)] = frozenset(numbers)
        return Binding(found)

    def check_enough(self, wanted: int, num_clients: int) -> None:
        """ConfigError if ``wanted`` clients are waited for, and fewer have a key by which they may come."""
        bound = set[int]().union(*self.clients.values())
        if self.clients and len(bound) < wanted:
            lost = ", ".join(str(c) for c in range(num_clients) if c not in bound)
            raise ConfigError(
                f"engine.nodes: no key is bound to client {lost}, so that {wanted} clients can never be there; "
                f"bind one, or begin with fewer, engine.wait_for={len(bound)}"
            )

    def names(self, grid: Grid) -> dict[int, str]:
        """The registered name of each live node by its id, "" of one without; empty where nothing is bound."""
        return {node.node_id: str(node.name or "") for node in grid.get_nodes()} if self.clients else {}

    def stranger(self, name: str, names: Iterable[str]) -> str:
        """Why a node of that registered ``name`` gets no question at all, or nothing."""
        if not self.clients:
            return ""
        if not name:
            return "its key was registered without a name, or it has none; engine.nodes binds clients to named keys"
        if name not in self.clients:
            near = hint(name, self.clients)
            return f"its key {name!r:.80} is bound to no client by engine.nodes{near}"
        return f"{name!r} is the name of two live keys" if list(names).count(name) > 1 else ""

    def another(self, name: str, client: int) -> str:
        """Why the node of that ``name`` cannot be ``client``, or nothing."""
        if not self.clients or client in self.clients.get(name, ()):
            return ""
        mine = ", ".join(map(str, sorted(self.clients.get(name, ())))) or "none"
        owner = next((n for n, those in self.clients.items() if client in those), None)
        whose = f"is bound to {owner!r}" if owner else "is bound to no key"
        return f"it says that it is client {client}, which {whose}; its key {name!r} is bound to {mine} (engine.nodes)"


def _read(path: str) -> Any:
    """A name that stands twice is refused: nobody could tell which of the two counts."""
    try:
        return read_yaml(Path(path).expanduser())
    except ConfigError as error:
        more = f"; expected names with their clients, as in {EXAMPLE}" if "holds no" in str(error) else ""
        raise ConfigError(f"engine.nodes={error}{more}") from None

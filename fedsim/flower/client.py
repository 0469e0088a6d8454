"""The ClientApp: one for all methods. It builds the client from the run's configuration and runs the same code on it
as a simulation's worker."""

from __future__ import annotations

from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.engine.allocator import give_back
from fedsim.errors import FedsimError
from fedsim.flower import contract
from fedsim.flower.answers import absent, answer_records
from fedsim.flower.introductions import introduction_records
from fedsim.flower.nodelog import unforeseen
from fedsim.flower.options import at_node, plain_error
from fedsim.flower.site import Site, forget
from fedsim.flower.wire import MessageError, address_of_any, addressed, read_ask

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Which clients this node is and what they have; or why it can be none."""
    try:
        about: list[dict[str, Any]] = [site.describe() for site in _sites(context, message.content)]
    except FedsimError as error:
        about = [{"refused": plain_error(error)}]
    except Exception as error:  # of what nobody thought of
        about = [{"refused": unforeseen(error, "a question")}]
    return Message(introduction_records(about), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """One client's part in one exchange, whatever the method calls it."""
    layout, to = None, address_of_any(message.content)
    give_back()  # what Flower needed to put the message together
    try:
        to = addressed(message.content)
        site = _sites(context, message.content, to.client)[0]
        layout = site.worker.model.layout
        ask = read_ask(message.content, layout)
        give_back()  # the pieces that it came in
        answer = site.answer(ask)
        site.node.count(answer.outcome)
    except MessageError as error:
        answer = absent(to.client, "failed", unforeseen(error, f"client {to.client}"))
    except FedsimError as error:
        answer = absent(to.client, "failed", plain_error(error))
    except MemoryError:
        raise  # there may be room in another process
    except Exception as error:  # of what nobody thought of
        answer = absent(to.client, "failed", unforeseen(error, f"client {to.client}"))
    content = answer_records(answer, layout, to)
    forget(layout)
    give_back()
    return Message(content, reply_to=message)


def _sites(context: Context, content: RecordDict, client: int | None = None) -> list[Site]:
    """The node as each of its clients, or as the one that is asked."""
    config, nodes = at_node(context.run_config, context.node_config, client)
    with nodes[0].at_home():
        settled = contract.settle(config, content)
        return [Site.of(settled, node, context.run_id) for node in nodes]

"""The ClientApp: one for all methods. It builds the client from the run's configuration and runs the same code on it
as a simulation's worker."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.errors import FedsimError
from fedsim.flower import contract
from fedsim.flower.answers import absent, answer_records
from fedsim.flower.options import at_node, plain_error
from fedsim.flower.site import Site
from fedsim.flower.wire import addressed, read_ask

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Which client this node is and what it has; or why it can be none."""
    try:
        about: dict[str, Any] = _site(context, message.content).describe()
    except FedsimError as error:
        about = {"refused": plain_error(error)}
    return Message(RecordDict({"node": ConfigRecord(about)}), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """One client's part in one exchange, whatever the method calls it."""
    layout, to = None, addressed(message.content)
    try:
        site = _site(context, message.content)
        layout = site.worker.model.layout
        answer = site.answer(read_ask(message.content, layout))
        site.node.count(answer.outcome)
    except FedsimError as error:
        answer = absent(to.client, "failed", plain_error(error))
    return Message(answer_records(answer, layout, to), reply_to=message)


def _site(context: Context, content: RecordDict) -> Site:
    config, node = at_node(context.run_config, context.node_config)
    with node.at_home():
        return Site.of(contract.settle(config, content), node)

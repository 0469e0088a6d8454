"""The steps of a run, in the order ``fedsim.api.run`` takes them: settle, enter, load, assemble, execute."""

from fedsim.session.assembly import assemble, describe, start_engine
from fedsim.session.folder import enter, finished_summary, locked
from fedsim.session.outcome import execute, summarise
from fedsim.session.preparation import learning_task, load_data, plan, settle

__all__ = [
    "assemble",
    "describe",
    "enter",
    "execute",
    "finished_summary",
    "learning_task",
    "load_data",
    "locked",
    "plan",
    "settle",
    "start_engine",
    "summarise",
]

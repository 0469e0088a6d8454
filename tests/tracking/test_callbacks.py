"""A caller's callbacks: refused before the run where nothing would call them; their errors end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from problems import classification, hashes

import fedsim
from fedsim.errors import CallbackError, ConfigError
from fedsim.tracking import read_rows
from fedsim.tracking.callbacks import admitted


def made(*names: str, **methods: Any) -> Any:
    """An object with methods of these names, which take anything."""
    empty = {name: lambda self, *_: None for name in names}
    return type("Mine", (), {**empty, **methods})()


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (
            [print],
            "callbacks: print is a function, which nothing would call; expected an object with any of the hooks",
        ),
        ([lambda row, clients: None], "<lambda> is a function"),
        ([made("on_round")], r"Mine has on_round\(\), which nothing would call \(is it round\?\)"),
        ([made("rounds")], r"Mine has rounds\(\), which nothing would call \(is it round\?\)"),
        ([made("round", "ends")], r"Mine has ends\(\), which nothing would call \(is it end\?\)"),
        (
            [made("round", "on_fit_begin")],
            r"on_fit_begin\(\), which nothing would call \(a hook of another library",
        ),
        ([made("round_end")], r"round_end\(\), which nothing would call \(is it round\?\)"),
        ([made("plot")], r"Mine has no hook, so nothing would call it; expected .*round\(row, clients\)"),
        ([made("round").__class__], r"Mine is a class; hand over an object, Mine\(\)"),
        (made("round"), r"callbacks: expected a list, got Mine; type callbacks=\[...\]"),
        ([made(round=lambda self, row: None)], r"Mine: round\(row\) is called as round\(row, clients\)"),
    ],
)
def test_what_nothing_would_call_is_refused_with_the_hooks_that_there_are(callbacks: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        classification().run(callbacks=callbacks)
    assert not Path("runs").exists()


def test_hooks_and_helpers_of_a_callback_are_taken() -> None:
    good = [
        made("start", "phase", "round", "end"),
        made("round", "count", "save", "finish"),
        fedsim.tracking.Tracker(),
    ]
    assert admitted(good) == good


class Breaks:
    """A callback that fails."""

    def __init__(self, hook: str, at: int = 2):
        self.at, self.ended = at, ""
        setattr(self, hook, getattr(self, f"_{hook}"))

    def _start(self, run: Any) -> None:
        raise ValueError("no room")

    def _round(self, row: Any, clients: Any) -> None:
        if row["round"] == self.at:
            raise ValueError("no room")

    def _end(self, summary: Any) -> None:
        raise ValueError("no room")


def test_an_error_of_a_callback_ends_the_run_which_goes_on_from_there(tmp_path: Path) -> None:
    place = f"dir={tmp_path}"
    with pytest.raises(
        CallbackError, match=r"the callback Breaks.round failed in round 2: ValueError: no room"
    ) as e:
        classification().run(place, callbacks=[Breaks("round")])
    assert isinstance(e.value.__cause__, ValueError)
    assert [row["round"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "checkpoint").iterdir())
    assert hashes(classification().run(place)) == hashes(classification().run())


@pytest.mark.parametrize("hook", ["start", "end"])
def test_the_other_trackers_hear_that_the_run_ended(hook: str, tmp_path: Path) -> None:
    class Listener:
        status = ""

        def end(self, summary: Any) -> None:
            self.status = summary["status"]

    listener = Listener()
    with pytest.raises(
        CallbackError, match=f"Breaks.{hook} failed (while the run was set up|as the run ended)"
    ):
        classification().run(f"dir={tmp_path}", callbacks=[Breaks(hook), listener])
    assert listener.status == ("failed" if hook == "start" else "done")

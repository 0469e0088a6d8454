"""A caller's callbacks: refused before the run where nothing would call them; their errors end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import classification, hashes

import fedsim
from fedsim.errors import CallbackError, ConfigError
from fedsim.server.loop import Loop
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
        (
            [made(round=lambda self: None)],
            r"Mine: round\(\) is called as round\(row, clients\) or round\(info\)",
        ),
        ([made("start", round=3)], r"Mine: round is int, which nobody can call; define round\(...\)"),
        ([made("evaluate")], r"Mine has evaluate\(\), which nothing would call \(is it evaluated\?\)"),
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


class Note(fedsim.Callback):
    """Notes what it is told, and stops where it is told to."""

    def __init__(self, stop_at: int = 0):
        self.stop_at, self.said, self.seen = stop_at, [], {}

    def evaluated(self, info: Any) -> None:
        self.said.append(("evaluated", info.round, info.row["accuracy"]))

    def round(self, info: Any) -> None:
        self.said.append(("round", info.round, len(info.history)))
        self.seen[info.round] = info
        if info.round == self.stop_at:
            info.stop("enough")

    def end(self, summary: Any) -> None:
        self.said.append(("end", summary["status"], summary.get("stopped")))
        self.last = summary.weights if self.seen else None


def test_callbacks_have_the_models_of_each_round_at_hand() -> None:
    note, problem = Note(), classification("bn")
    result = problem.run("evaluation.every=2", callbacks=[note])
    assert [s[:2] for s in note.said] == [
        ("round", 1),
        ("evaluated", 2),
        ("round", 2),
        ("round", 3),
        ("evaluated", 4),
        ("round", 4),
        ("end", "done"),
    ]
    short = problem.run("rounds=2")
    for name, value in note.seen[2].weights.items():
        assert torch.equal(value, short.weights[name])
    model = note.seen[2].model()
    x, y = problem.test  # type: ignore[misc]
    assert float((model(x).argmax(1) == y).double().mean()) == pytest.approx(note.seen[2].row["accuracy"])
    with torch.no_grad():
        model[0].weight.zero_()  # nobody's but the callback's
    assert all(torch.equal(note.last[k], v) for k, v in result.weights.items())
    with pytest.raises(ConfigError, match="there is no model 'globl', but global; nearest is 'global'"):
        note.seen[1].model("globl")


def test_a_callback_that_stops_the_run_gives_what_a_shorter_run_gives(tmp_path: Path) -> None:
    place, straight = f"dir={tmp_path}", classification().run()
    stopped = classification().run(place, callbacks=[Note(2)])
    assert hashes(stopped) == hashes(straight)[:2]
    assert (stopped.summary["status"], stopped.summary["rounds"], stopped.summary["stopped"]) == (
        "done",
        2,
        "enough",
    )
    again = Note(2)
    assert hashes(classification().run(place, callbacks=[again])) == hashes(stopped), "it would stop again"
    assert not again.said
    assert hashes(classification().run(place, "rounds=5", callbacks=[Note(3)])) == hashes(straight)[:3]
    whole = classification().run(place)
    assert hashes(whole) == hashes(straight) and "stopped" not in whole.summary


def test_early_stopping_of_the_page_stops_when_the_loss_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/using_results.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.split("```python\n")[3].split("```")[0], scope)
    losses, plain = [3.0, 2.0, 2.5, 2.1, 1.0], Loop._measured
    told = lambda self, server, state: {"val/loss": losses[server.round.index], **plain(self, server, state)}  # noqa: E731
    monkeypatch.setattr(Loop, "_measured", told)
    result = classification().run("rounds=5", callbacks=[scope["EarlyStopping"](patience=2)])
    assert result.summary["rounds"] == 4 and "validation" in result.summary["stopped"]


@pytest.mark.parametrize(
    ("found", "said"),
    [(True, r"it returned True; to end the run call info\.stop"), (ValueError("no"), "ValueError: no")],
)
def test_an_error_in_evaluated_ends_the_run(found: Any, said: str) -> None:
    class Odd:
        def evaluated(self, info: Any) -> Any:
            if isinstance(found, Exception):
                raise found
            return found

    with pytest.raises(CallbackError, match=rf"Odd\.evaluated failed in round 1: .*{said}"):
        classification().run("evaluation.every=1", callbacks=[Odd()])

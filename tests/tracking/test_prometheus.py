"""The file for dashboards: what Prometheus' own format says, kept up to date, and added to by later processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from problems import classification

from fedsim.tracking.prometheus import HELP, Samples, add, exposition, parsed

LINE = re.compile(
    r'# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*"(,|(?=\})))+\})? -?[0-9.e+-]+'
)


def test_a_run_keeps_its_file_up_to_date(tmp_path: Path) -> None:
    path, seen = tmp_path / "collected/fedsim.prom", []

    class Look:
        def round(self, row: dict[str, float], clients: object) -> None:
            seen.append({n: v for (n, _), v in parsed(path.read_text()).items()})

    run = classification().run(f"tracker.prometheus={path}", "evaluation.every=1", callbacks=[Look()])
    text = path.read_text()
    assert text.endswith("\n") and all(LINE.fullmatch(line) for line in text.splitlines()), text
    assert [s["fedsim_rounds_total"] for s in seen] == [1, 2, 3, 4]
    assert [s["fedsim_running"] for s in seen] == [1, 1, 1, 1]
    last = {(n, dict(labels).get("direction")): v for (n, labels), v in parsed(text).items()}
    assert last["fedsim_running", None] == 0 == last["fedsim_failed", None]
    assert last["fedsim_rounds_wanted", None] == 4
    assert last["fedsim_bytes_total", "up"] == sum(row["bytes_up"] for row in run.rows)
    assert last["fedsim_loss", None] == pytest.approx(run.rows[-1]["loss"])
    assert text.count("# TYPE fedsim_bytes_total counter\n") == 1
    assert [p.name for p in path.parent.iterdir()] == ["fedsim.prom"], "no half-written file stays"


def test_processes_of_one_message_each_add_up(tmp_path: Path) -> None:
    path, mine = tmp_path / "node.prom", (("client", "3"), ("outcome", 'a "b"\\\nc'))
    for more in (1, 2.5):
        add(
            path,
            [("fedsim_node_messages_total", mine, more)],
            [("fedsim_node_last_message_timestamp_seconds", ())],
        )
    found = parsed(path.read_text())
    assert found["fedsim_node_messages_total", mine] == 3.5
    assert found["fedsim_node_last_message_timestamp_seconds", ()] > 1.7e9
    assert all(LINE.fullmatch(line) for line in path.read_text().splitlines())


def test_text_and_back() -> None:
    samples: Samples = {(name, (("run", "x"),)): 0.1 + k for k, name in enumerate(HELP)}
    assert parsed(exposition(samples)) == samples
    assert parsed("nonsense here\n# TYPE x gauge\n") == {}

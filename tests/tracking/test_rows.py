"""Client rows: a line for each client, which reads as if each row had been built and written by itself."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.tracking.rows import ClientRows, from_json, packed, tidy, to_json

numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.floats(width=32).map(np.float32),
    st.integers(0, 2**31).map(np.int64),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.dictionaries(st.text(min_size=1), numbers, max_size=4))))
def test_the_text_is_that_of_the_rows(values) -> None:
    rows = ClientRows(3, values)
    lines = [from_json(line) for line in rows.text().splitlines()]
    assert len(lines) == sum(bool(v) for _, v in values)
    read = [to_json(row) for line in lines for row in tidy(line)]
    assert read == [to_json(row) for row in rows]
    assert [to_json(row) for line in packed(rows) for row in tidy(from_json(line))] == read
    assert len(rows) == len(list(rows)) == sum(len(v) for _, v in values)


def test_rows_in_the_order_of_clients_and_metrics() -> None:
    rows = ClientRows(2, [(7, {"loss": 0.5, 'a "b"': math.nan}), (9, {"loss": math.inf}), (11, {})])
    assert rows[0] == {"round": 2, "client": 7, "metric": "loss", "value": 0.5}
    assert [(r["client"], r["metric"]) for r in rows[1:]] == [(7, 'a "b"'), (9, "loss")]
    assert rows.text().splitlines() == [
        '{"round": 2, "client": 7, "values": {"loss": 0.5, "a \\"b\\"": "NaN"}}',
        '{"round": 2, "client": 9, "values": {"loss": "Infinity"}}',
    ]
    assert math.isnan(from_json(rows.text().splitlines()[0])["values"]['a "b"'])

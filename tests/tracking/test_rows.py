"""Client rows: written at once, they read as if each had been built and written by itself."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.tracking.rows import ClientRows, from_json, to_json

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
    assert rows.text() == "".join(to_json(row) + "\n" for row in rows)
    assert len(rows) == len(list(rows)) == sum(len(v) for _, v in values)


def test_rows_in_the_order_of_clients_and_metrics() -> None:
    rows = ClientRows(2, [(7, {"loss": 0.5, 'a "b"': math.nan}), (9, {"loss": math.inf}), (11, {})])
    assert rows[0] == {"round": 2, "client": 7, "metric": "loss", "value": 0.5}
    assert [(r["client"], r["metric"]) for r in rows[1:]] == [(7, 'a "b"'), (9, "loss")]
    assert rows.text().splitlines() == [
        '{"round": 2, "client": 7, "metric": "loss", "value": 0.5}',
        '{"round": 2, "client": 7, "metric": "a \\"b\\"", "value": "NaN"}',
        '{"round": 2, "client": 9, "metric": "loss", "value": "Infinity"}',
    ]
    assert math.isnan(from_json(rows.text().splitlines()[1])["value"])

"""Contracts that one-shot methods keep in another way than the others, or have no part in, and why.

``WHY`` gives reasons by contract (name of its test) and label of the method, ``*`` for all of them. Every contract that
is not named here is tried on all of them as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASKED_ONCE = (
    "tests/contracts/test_asked_once.py has it of the first round, the only one in which clients are asked"
)
OWN = "its student is trained at the server, on samples of the server's"
NO_TRAINING = "its clients train nothing: they send sums over frozen features"
ONE_POLICY = (
    "models travel whole: whatever `buffers` says, statistics are part of what is sent (traits.buffers)"
)
SINGLE = "it works on the models of single clients"
LEARNS_ON = "who failed in training still learns the aggregator"

WHY: Mapping[str, Mapping[str, str]] = {
    "test_an_empty_cohort_changes_nothing": {"*": ASKED_ONCE},
    "test_if_nobody_answers_nothing_changes": {"*": ASKED_ONCE},
    "test_rounds_nobody_is_there_for_change_nothing_but_the_time": {"*": ASKED_ONCE},
    "test_a_failing_client_is_skipped_as_if_it_had_not_been_asked": {
        "fens": LEARNS_ON,
        "analytic": NO_TRAINING,
    },
    "test_a_failing_client_stops_the_run_by_default_and_is_named": {"analytic": NO_TRAINING},
    "test_interrupted_within_a_round_that_round_is_done_again_from_the_start": {"analytic": NO_TRAINING},
    "test_writing_to_the_message_is_an_error_whatever_the_policy": {"analytic": NO_TRAINING},
    "test_averaged_statistics_are_the_weighted_mean_and_counters_stay": {
        "co-boosting": OWN,
        "dense": OWN,
        "feddf": OWN,
        "analytic": NO_TRAINING,
    },
    "test_local_statistics_stay_with_their_client": {"*": ONE_POLICY},
    "test_all_local_norm_weights_never_leave_their_client": {"*": ONE_POLICY},
    "test_absent_clients_keep_their_state_bit_for_bit": {"*": ONE_POLICY},
    "test_with_the_configured_mean_no_single_update_leaves_its_worker": {"*": SINGLE},
    "test_float32_and_float64_agree_to_rounding": {
        "*": "needs class labels, which the quadratic problem has not"
    },
    "test_float64_means_float64_everywhere": {
        "co-boosting": "labels of the samples made are whole numbers",
        "dense": "labels of the samples made are whole numbers",
        "analytic": NO_TRAINING,
    },
}


def reason(test: str, params: Mapping[str, Any]) -> str:
    """Why the contract ``test`` is not tried on the method in ``params``; empty if it is."""
    entry = params.get("entry")
    if entry is None or not entry.once:
        return ""
    found = WHY.get(test, {})
    return found.get("*") or found.get(entry.label, "")

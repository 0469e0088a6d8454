"""Contracts that one-shot methods keep in another way than the others, or have no part in, and why.

``WHY`` gives reasons by contract (name of its test) and label of the method, ``*`` for all that ask once. What is not
named here is tried on all of them as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASKED_ONCE = (
    "tests/contracts/test_asked_once.py has it of the first round, the only one in which clients are asked"
)
ADDED = "it asks everybody in the first round and adds who comes late: tests/strategies/test_analytic.py"
OWN = "its student is trained at the server, on samples of the server's"
FROZEN = "its clients train nothing: they send sums over frozen features"
ONE_POLICY = (
    "models travel whole: whatever `buffers` says, statistics are part of what is sent (traits.buffers)"
)
SINGLE = "it works on the models of single clients"
APART = "each of its clients keeps samples of its own choice apart"
AGAIN = "it asks the same clients in every round, for its aggregator"
LEARNS_ON = "who failed in training still learns the aggregator"
LABELS = "needs class labels, which the quadratic problem has not"
WHOLE_NUMBERS = "labels of the samples that it makes are whole numbers"

WHY: Mapping[str, Mapping[str, str]] = {
    "test_a_run_repeats_itself_whatever_the_global_generator_says_and_depends_on_the_seed": {
        "analytic": "nothing is drawn in it"
    },
    "test_an_empty_cohort_changes_nothing": {"*": ASKED_ONCE},
    "test_if_nobody_answers_nothing_changes": {"*": ASKED_ONCE, "analytic": ADDED},
    "test_rounds_nobody_is_there_for_change_nothing_but_the_time": {"*": ASKED_ONCE, "analytic": ADDED},
    "test_a_failing_client_is_skipped_as_if_it_had_not_been_asked": {"fens": LEARNS_ON},
    "test_averaged_statistics_are_the_weighted_mean_and_counters_stay": {
        "co-boosting": OWN,
        "dense": OWN,
        "feddf": OWN,
        "fens": APART,
        "analytic": FROZEN,
    },
    "test_local_statistics_stay_with_their_client": {"*": ONE_POLICY, "analytic": FROZEN},
    "test_all_local_norm_weights_never_leave_their_client": {"*": ONE_POLICY, "analytic": FROZEN},
    "test_absent_clients_keep_their_state_bit_for_bit": {"*": ONE_POLICY, "analytic": FROZEN},
    "test_with_the_configured_mean_no_single_update_leaves_its_worker": {"*": SINGLE},
    "test_float32_and_float64_agree_to_rounding": {"*": LABELS},
    "test_float64_means_float64_everywhere": {"co-boosting": WHOLE_NUMBERS, "dense": WHOLE_NUMBERS},
    "test_padding_of_states_and_updates_stays_zero": {
        "analytic": "its clients send sums, no vector of the model"
    },
    "test_a_nonfinite_client_is_named_and_left_out": {"fens": AGAIN},
    "test_a_dropped_client_is_as_if_it_had_not_been_asked": {"fens": AGAIN},
    "test_under_a_rule_no_vector_is_summed_up_before_it": {
        "analytic": "there is no vector: rules are refused"
    },
    "test_identical_clients_are_one_client": {
        "feddf": "where student and teacher are equal, Adam takes steps along rounding",
        "analytic": "the ridge stands against all samples together, five times as many as of one client",
    },
}


def reason(test: str, params: Mapping[str, Any]) -> str:
    """Why the contract ``test`` is not tried on the method in ``params``; empty if it is."""
    entry, found = params.get("entry"), WHY.get(test, {})
    if entry is None:
        return ""
    return found.get(entry.label) or (found.get("*", "") if entry.once else "")

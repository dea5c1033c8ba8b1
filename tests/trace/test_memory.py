import pytest
from trace_rows import failed, row

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.memory import MemoryTrace


def test_done_means_measured_and_failures_are_done_unless_they_are_to_be_retried() -> None:
    for retry in (False, True):
        trace = MemoryTrace(retry_failed=retry)
        trace.append(row(0))
        trace.append(failed(1))
        assert trace.done(row(0).key)
        assert trace.done(failed(1).key) is not retry
        assert not trace.done(row(2).key)


def test_a_row_measured_again_takes_the_place_of_the_older_one() -> None:
    trace = MemoryTrace()
    for one in (failed(0), row(1), row(0)):
        trace.append(one)
    assert [(found.step, found.status) for found in trace.rows] == [(0, "ok"), (1, "ok")]


def test_other_settings_under_the_same_label_are_refused_with_both_values() -> None:
    trace = MemoryTrace({"spectrum": '{"k":3,"loss":"cross-entropy"}'})
    trace.append(row(0))
    with pytest.raises(
        TraceError, match=r"(?s)'spectrum' with other settings.*k: 3 in the trace, 4 now.*new: absent"
    ) as caught:
        trace.append(row(1, settings='{"k":4,"loss":"cross-entropy","new":1}'))
    assert "loss" not in str(caught.value)
    assert "another label" in str(caught.value)
    assert trace.rows == [trace.rows[0]]
    with pytest.raises(TraceError, match="k: 3 in the trace, 5 now"):
        trace.expect({"spectrum": '{"k":5,"loss":"cross-entropy"}'})
    trace.expect({"spectrum": '{"loss": "cross-entropy", "k": 3}'})


def test_a_refused_row_is_not_kept() -> None:
    trace = MemoryTrace()
    trace.append(row(0))
    with pytest.raises(TraceError):
        trace.append(row(1, variables={"pair": row(0).variables["total"]}))
    assert len(trace.rows) == 1


def test_rows_get_the_provenance_of_the_trace_unless_they_bring_their_own() -> None:
    trace = MemoryTrace(provenance={"by": "me"})
    trace.append(row(0))
    trace.append(row(1, provenance='{"by":"you"}'))
    assert [found.provenance for found in trace.rows] == ['{"by":"me"}', '{"by":"you"}']

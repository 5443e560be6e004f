"""Shares by weight, and who moves when an output comes or goes."""

from collections import Counter

import pytest

from service.dataplane.processors import balance
from service.dataplane.processors.balance import Balance
from service.packet import build
from tests.dataplane.chains import FakeContext, run

PEER = bytes([192, 0, 2, 7])


def flow(number: int, *, back: bool = False) -> bytes:
    host = bytes([10, 0, number >> 8, number & 255])
    return build.udp(PEER, 53, host, 4000, b"!") if back else build.udp(host, 4000, PEER, 53, b"?")


def places(stage: Balance, context: FakeContext, packets: list[bytes]) -> list[str]:
    """Where each packet goes."""
    found = []
    for start in range(0, len(packets), 64):
        for output in context.outputs.values():
            output.sent.clear()
        part = packets[start : start + 64]
        assert run(stage, part).left() == []
        where = {octets: name for name, output in context.outputs.items() for octets in output.sent}
        found += [where[packet] for packet in part if packet in where]
        for output in context.outputs.values():
            assert output.sent == [packet for packet in part if where.get(packet) == output.name], "in their order"
    return found


def made(*targets: tuple[str, int], symmetric: bool = True) -> tuple[Balance, FakeContext]:
    context = FakeContext()
    to = [{"to": name, "weight": weight} for name, weight in targets]
    return Balance({"to": to, "symmetric": symmetric}, context), context


FLOWS = [flow(number) for number in range(3000)]


def test_flows_are_spread_by_weight_and_stay() -> None:
    stage, context = made(("a", 1), ("b", 2), ("c", 3))
    first = places(stage, context, FLOWS)
    shares = Counter(first)
    for name, share in (("a", 500), ("b", 1000), ("c", 1500)):
        assert abs(shares[name] - share) < 120, shares
    assert places(stage, context, FLOWS) == first
    again, other = made(("c", 3), ("a", 1), ("b", 2))
    assert places(again, other, FLOWS) == first, "the order in the spec, and a new worker, make no difference"


def test_an_output_that_goes_gives_only_its_own_flows() -> None:
    stage, context = made(("a", 1), ("b", 1), ("c", 1))
    first = places(stage, context, FLOWS)
    context.outputs["b"].ready = False
    second = places(stage, context, FLOWS)
    for before, after in zip(first, second, strict=True):
        assert after != "b"
        assert before in ("b", after)
    assert {after for before, after in zip(first, second, strict=True) if before == "b"} == {"a", "c"}
    assert context.counted["flows_moved"] == first.count("b")
    context.outputs["b"].ready = True
    assert places(stage, context, FLOWS) == second, "a flow stays where it is while that is ready"
    fresh = [flow(number) for number in range(3000, 4000)]
    assert "b" in places(stage, context, fresh)


def test_a_weight_that_changes_moves_a_share_and_no_more() -> None:
    before = places(*made(("a", 1), ("b", 1)), FLOWS)
    after = places(*made(("a", 1), ("b", 1), ("c", 1)), FLOWS)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"c"}
    assert abs(len(moved) - 1000) < 120


def test_both_directions_go_the_same_way_if_asked() -> None:
    backs = [flow(number, back=True) for number in range(3000)]
    stage, context = made(("a", 1), ("b", 1))
    assert places(stage, context, FLOWS) == places(stage, context, backs)
    stage, context = made(("a", 1), ("b", 1), symmetric=False)
    there, back = places(stage, context, FLOWS), places(stage, context, backs)
    assert 1200 < sum(one == other for one, other in zip(there, back, strict=True)) < 1800


def test_without_a_ready_output_one_is_asked_that_counts_it() -> None:
    stage, context = made(("a", 1), ("b", 1))
    for output in context.outputs.values():
        output.ready = False
    assert places(stage, context, FLOWS[:64]) == []
    for output in context.outputs.values():
        output.ready = True
    assert set(places(stage, context, FLOWS)) == {"a", "b"}


def test_what_is_forgotten_goes_home_and_what_is_used_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "FLOWS_REMEMBERED", 100)
    stage, context = made(("a", 1), ("b", 1))
    first = places(stage, context, FLOWS[:50])
    context.outputs["a"].ready = False
    assert set(places(stage, context, FLOWS[:50])) == {"b"}
    context.outputs["a"].ready = True
    for start in range(50, 1000, 50):
        places(stage, context, FLOWS[start : start + 50])
        assert set(places(stage, context, FLOWS[:25])) == {"b"}
    assert places(stage, context, FLOWS[25:50]) == first[25:50]
    assert len(stage._young) + len(stage._old) <= 200


def test_frames_that_are_no_ip_are_one_flow() -> None:
    stage, context = made(("a", 1), ("b", 1))
    run(stage, [b"", b"\x45", b"\x00" * 40])
    assert sorted(len(output.sent) for output in context.outputs.values()) == [0, 3]


@pytest.mark.parametrize("to", [[], [{"to": "tun0", "weight": 1}]])
def test_nothing_is_balanced_to_nowhere_or_round(to: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="to:"):
        Balance({"to": to}, FakeContext())

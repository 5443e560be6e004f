"""Without root and without a service: a fake context, and packets from `service.packet.build`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tunledger_dying import Dying

from service.dataplane.fake import FakeContext, run
from service.packet import build

HOST, SERVER = bytes([10, 0, 0, 1]), bytes([192, 0, 2, 53])
HOST6, SERVER6 = bytes([0xFD, *bytes(14), 1]), bytes([0xFD, *bytes(14), 53])


def test_what_is_about_to_expire_is_dropped_and_queries_are_counted() -> None:
    context = FakeContext()
    living = [build.udp(HOST, 4000, SERVER, 53, b"?"), build.udp(HOST6, 4000, SERVER6, 53, b"?"), b"no packet"]
    dying = [build.udp(HOST, 4000, SERVER, 53, b"?", ttl=1), build.udp(HOST6, 4000, SERVER6, 53, b"?", ttl=1)]
    batch = run(Dying({}, context), [living[0], *dying, *living[1:]])
    assert batch.left() == living
    assert batch.dropped == {"expired": 2}
    assert context.counted == {"expired": 2, "dns_queries": 2}


def test_frames_may_have_vlan_tags() -> None:
    context = FakeContext("tap")
    frame = build.ethernet(b"\x02" * 6, b"\x06" * 6, build.udp(HOST, 1, SERVER, 53, b"?"), tags=b"\x81\0\0\7")
    run(Dying({}, context), [frame], mode="tap")
    assert context.counted == {"dns_queries": 1}


@pytest.mark.parametrize("options", [{"least": 0}, {"least": "2"}, {"most": 3}])
def test_options_that_will_not_do_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="least"):
        Dying(options, FakeContext())


@given(st.lists(st.binary(max_size=80)), st.sampled_from(("tun", "tap")))
def test_nothing_that_comes_does_harm(packets: list[bytes], mode: str) -> None:
    run(Dying({}, FakeContext("tap" if mode == "tap" else "tun")), packets, mode=mode)

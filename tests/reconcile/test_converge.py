"""What `converge` tells the data plane; what it makes of the kernel is in tests/domain/test_convergence.py."""

from typing import Any

import pytest

from service.dataplane.errors import DataplaneError
from service.domain.spec import Processing, parse_spec
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName, NodeId
from service.kernel.fake import FakeKernel
from service.reconcile.converge import Wanted, converge
from service.reconcile.hands import Hands
from tests.reconcile.rig import CountingDataPlane


@pytest.mark.parametrize("failures", [1, 2])
def test_processors_learn_a_new_mtu_though_telling_them_fails(failures: int) -> None:
    plane = MtuPlane()
    hands = Hands(FakeKernel(), plane)
    token = Token(NodeId("0" * 12), InterfaceId("0190b8a0-0000-7000-8000-000000000001"))
    fields = {"name": "tun0", "processing": {"running": True, "chain": [{"processor": "inspect"}]}}
    name = InterfaceName("tun0")
    (made,) = converge(hands, [Wanted(token, name, parse_spec({**fields, "mtu": 1500}))])
    assert (made.error, plane.mtus) == (None, {token.interface_id: 1500})
    plane.failures = failures
    wanted = Wanted(token, name, parse_spec({**fields, "mtu": 1400}))
    (changed,) = converge(hands, [wanted])
    assert (changed.error is None) is (failures == 1)
    (last,) = converge(hands, [wanted])
    assert (last.error, plane.mtus) == (None, {token.interface_id: 1400})
    plane.close()


class MtuPlane(CountingDataPlane):
    """Keeps what was said of the mtu; `configure` fails so many times."""

    def __init__(self) -> None:
        super().__init__()
        self.mtus: dict[str, int] = {}
        self.failures = 0

    def attach(self, device: str, fd: int, *, mtu: int = 1500, **others: Any) -> str:
        self.mtus[device] = mtu
        return super().attach(device, fd, mtu=mtu, **others)

    def configure(self, device: str, processing: Processing, mtu: int) -> None:
        if self.failures:
            self.failures -= 1
            raise DataplaneError("device_busy", "another call is at work on it", retry=True)
        self.mtus[device] = mtu
        super().configure(device, processing, mtu)

"""One event of every type, as release 0.1.0 would write it. The files in `golden/` hold their payloads for good."""

import ipaddress
from collections.abc import Mapping
from typing import Final

from service.domain import events as ev
from service.domain.commands import Request
from service.domain.spec import InterfaceSpec, Processing
from service.domain.values import Address, CommandId, InterfaceId, InterfaceName, Mode, Mtu

ID = InterfaceId("0192f0c1-7d3e-7cc2-9c11-0242ac120002")
NAME = InterfaceName("tun0")
WORDS = "caf\u00e9 \u2014 \U0001f600\n\x00\x7f\u2028"
REQUEST = Request(via="classic", peer="127.0.0.1:40112", user="root", reason=WORDS)
BARE_REQUEST = Request(via="cli")
SPEC = InterfaceSpec(
    name=NAME,
    mode=Mode.TAP,
    addresses=(
        Address(ipaddress.IPv4Address("10.0.0.1"), 24),
        Address(ipaddress.IPv6Address("2001:db8::1"), 64),
    ),
    mtu=Mtu(1400),
    up=False,
    txqueuelen=500,
    owner=1000,
    group=1000,
    multi_queue=True,
    mac="02:00:00:00:00:01",
    netns="blue",
    processing=Processing(running=True, chain=({"processor": "forward", "on_crash": "restart", "to": "tun1"},)),
    description='a "lab" at \u00c5s',
    labels={"b": "2", "a/x": "1", "a-x": "\u00e9"},
)
BARE_SPEC = InterfaceSpec(name=NAME)

SAMPLES: Final[Mapping[str, ev.Event]] = {
    type(body).__name__: body
    for body in (
        ev.InterfaceDeclared(interface_id=ID, name=NAME, spec=SPEC, request=REQUEST),
        ev.InterfaceReconfigured(
            interface_id=ID,
            name=NAME,
            spec=BARE_SPEC,
            changes=[
                {"path": "mtu", "old": 1400, "new": 1500},
                {"path": "addresses", "old": ["10.0.0.1/24"], "new": []},
                {"path": "mac", "old": "02:00:00:00:00:01", "new": None},
                {"path": "processing.running", "old": True, "new": False},
            ],
            request=BARE_REQUEST,
        ),
        ev.ProcessingEnabled(interface_id=ID, name=NAME, request=REQUEST),
        ev.ProcessingDisabled(interface_id=ID, name=NAME, request=REQUEST),
        ev.InterfaceRetired(interface_id=ID, name=NAME, request=REQUEST),
        ev.CommandApplied(
            interface_id=ID, name=NAME, by="recovery", took_us=3141, steps=["ip tuntap add tun0 mode tap", "# adopt"]
        ),
        ev.CommandFailed(
            interface_id=ID,
            name=NAME,
            by="command",
            took_us=2**53 - 1,
            code="kernel_refused",
            message="ip link set tun0 up: No buffer space available (ENOBUFS)",
            errno="ENOBUFS",
            undone=True,
        ),
        ev.ChangeConfirmed(interface_id=ID, name=NAME, confirms=CommandId("command-1"), request=BARE_REQUEST),
        ev.DriftDetected(
            interface_id=ID,
            name=NAME,
            cause="reboot",
            differences=[{"path": "tun0", "desired": "present", "observed": None}],
        ),
        ev.DriftRepaired(interface_id=ID, name=NAME, steps=["ip link set tun0 mtu 1400"], took_us=812),
        ev.RepairFailed(interface_id=ID, name=NAME, code="tun_missing", message="modprobe tun", errno=None),
        ev.DriftEnded(interface_id=ID, name=NAME),
        ev.InterfaceContested(
            interface_id=ID,
            name=NAME,
            repairs=5,
            within_s=60,
            differences=[{"path": "tun0.mtu", "desired": 1400, "observed": 1500}],
        ),
        ev.ContestEnded(interface_id=ID, name=NAME, quiet_s=61),
        ev.ReconcileRequested(request=REQUEST),
        ev.OrphanRemoved(interface_id=ID, name="tun7", ifindex=42),
        ev.WorkerExited(worker=0, pid=4242, status="killed by SIGKILL", devices=["tun0", "tun1"]),
        ev.ProcessorCrashed(
            interface_id=ID,
            name=NAME,
            worker=1,
            pid=4242,
            stage=2,
            processor="my-own",
            status="exit 70",
            error="ZeroDivisionError: division by zero",
            packet="450000",
            packet_bytes=1500,
            then="bypass",
        ),
        ev.CaptureStarted(
            interface_id=ID,
            name=NAME,
            capture_id="0192f0c1-7d3e-7cc2-9c11-0242ac120003",
            live=False,
            settings={"snaplen": 262144, "size_bytes": 67108864, "interval_s": None, "files": 4},
            request=REQUEST,
        ),
        ev.CaptureStopped(
            interface_id=ID,
            name=NAME,
            capture_id="0192f0c1-7d3e-7cc2-9c11-0242ac120003",
            reason="asked",
            packets=2,
            bytes=2**53 - 1,
            dropped=1,
        ),
        ev.ServiceStarted(
            pid=1,
            version="0.1.0",
            boot_id="5f2c2f0e-2f9a-4a3a-9d5e-0d6f4b1f7a11",
            uid=0,
            address="127.0.0.1:8080",
        ),
        ev.StartupReconciled(
            took_us=5000,
            recreated=["tun0"],
            repaired=[],
            adopted=["tun1"],
            orphans_removed=["tun7"],
            finished=[],
            processing_resumed=["tun0"],
            failed=[],
        ),
        ev.ServiceStopped(pid=1, reason="SIGTERM", interfaces="remove"),
        ev.CommandRejected(
            name="tun0",
            command="DeclareInterface",
            code="invalid_field",
            message='mtu: "x" is not a whole number; expected 68 to 65535',
            field="mtu",
            request=REQUEST,
            suppressed=3,
        ),
    )
}

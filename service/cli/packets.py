"""The commands on packets: tail, flows, packets, capture, processing."""

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from service.cli import show
from service.cli.client import CLOSED, CallError
from service.cli.options import (
    UNREACHABLE,
    USAGE,
    Command,
    Remote,
    Write,
    complete_names,
    fail,
    name_argument,
    refused,
    remote_options,
    remote_options_but_c,
    segment,
    write_options,
)

INTERRUPTED = 128 + 2  # SIGINT, as shells count it
_ETHERTYPES = {"0x0800": "IPv4", "0x86dd": "IPv6", "0x0806": "ARP"}


@click.command()
@remote_options_but_c
@name_argument
@click.option("-n", "numeric", is_flag=True, help="As with tcpdump: numbers only. They always are.")
@click.option("-c", "--count", type=click.IntRange(1), help="End after so many packets.")
@click.option("-e", "--ethernet", is_flag=True, help="With the Ethernet header, of a tap.")
@click.option("--rate", "rate_pps", type=click.IntRange(1), metavar="PPS", help="Packets a second at most.")
@write_options("reason")
def tail(
    remote: Remote, write: Write, name: str, numeric: bool, count: int | None, ethernet: bool, rate_pps: int | None
) -> None:
    """The packets of NAME as they come, in the manner of tcpdump. As JSON: one on each line. ^C ends it.

    \b
    Examples:
      tunledger tail tun0
      tunledger tail tun0 -c 10 --rate 1000
      tunledger tail tap0 -e -o json
    """
    del numeric
    params = {"limit": count, "rate_pps": rate_pps}
    shown = left_out = 0
    ended: str | None = None
    try:
        for event in remote.client.events(
            f"/api/v1/interfaces/{segment(name)}/tail",
            {key: value for key, value in params.items() if value is not None},
            after=None,
            headers=write.headers(),
        ):
            found = json.loads(event.data) if event.data else {}
            match event.kind:
                case "packet":
                    shown += 1
                    click.echo(json.dumps(found, ensure_ascii=False) if remote.json else _line(found, ethernet))
                case "left_out":
                    left_out += found["packets"]
                    _note(f"{found['packets']} packets left out")
                case "end":
                    ended = found["reason"]
                case _:
                    continue
    except CallError as error:
        refused(error)
    except KeyboardInterrupt:
        _note(f"{shown} packets shown, {left_out} left out")
        sys.exit(INTERRUPTED)
    if ended is not None:
        fail(ended)
    if shown != count:  # a stream that ends says so
        fail(CLOSED, UNREACHABLE)


def _note(text: str) -> None:
    click.echo(show.styled(f"tunledger: {text}", dim=True), err=True)


def _line(packet: Mapping[str, Any], ethernet: bool) -> str:
    at = datetime.fromisoformat(packet["at"]).astimezone()
    head = ""
    frame = packet["ethernet"]
    if ethernet and frame is not None:
        kind = _ETHERTYPES.get(frame["type"], "Unknown")
        tags = "".join(f", vlan {tag}" for tag in frame["vlans"])
        head = (
            f"{frame['source']} > {frame['destination']}{tags}, ethertype {kind} ({frame['type']}), "
            f"length {packet['length']}: "
        )
    return f"{at:%H:%M:%S.%f} {head}{packet['line']}"


@click.command()
@remote_options
@name_argument
@click.option("--limit", type=click.IntRange(1), help="The latest so many.")
@click.option("-e", "--ethernet", is_flag=True, help="With the Ethernet header, of a tap.")
def packets(remote: Remote, name: str, limit: int | None, ethernet: bool) -> None:
    """The latest packets of NAME, decoded. Needs inspect in its chain.

    \b
    Example:
      tunledger packets tun0 --limit 20
    """
    found = remote.get(f"/interfaces/{segment(name)}/packets", limit=limit)
    if remote.json:
        show.emit_json(found)
        return
    for packet in found["packets"]:
        click.echo(_line(packet, ethernet))


@click.command()
@remote_options
@name_argument
@click.option("--top", type=click.IntRange(1), help="So many, those with the most bytes.")
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
def flows(remote: Remote, name: str, top: int | None, as_json: bool) -> None:
    """Who talks to whom on NAME, by bytes; and totals by protocol. Needs inspect in its chain.

    FIRST is the end with the higher port, most likely the client, or else the lower address; who began is not known.
    SENT is what it sent, RETURNED what SECOND did.

    \b
    Examples:
      tunledger flows tun0 --top 5
      tunledger flows tun0 --json
    """
    found = remote.get(f"/interfaces/{segment(name)}/flows", top=top)
    if remote.json or as_json:
        show.emit_json(found)
        return
    rows = [
        [
            flow["protocol"],
            _end(flow["first"]),
            _end(flow["second"]),
            *(f"{flow[way][unit]:,}" for way in ("sent", "returned") for unit in ("packets", "bytes")),
            flow["tcp_flags"] or "",
            show.when(flow["last_seen"]),
        ]
        for flow in found["flows"]
    ]
    numbers = ("SENT", "BYTES", "RETURNED", "BYTES BACK")
    show.table(("PROTOCOL", "FIRST", "SECOND", *numbers, "FLAGS", "LAST SEEN"), rows, right=numbers)
    click.echo(f"{len(rows)} of {found['known']} flows")
    totals = [[kind, f"{each['packets']:,}", f"{each['bytes']:,}"] for kind, each in found["protocols"].items()]
    if totals:
        click.echo("")
        show.table(("CLASS", "PACKETS", "BYTES"), totals, right=("PACKETS", "BYTES"))


def _end(end: Mapping[str, Any]) -> str:
    return end["address"] if end["port"] is None else f"{end['address']}.{end['port']}"


@click.command()
@remote_options
@name_argument
def processing(remote: Remote, name: str) -> None:
    """How the chain of NAME is doing, stage by stage.

    \b
    Example:
      tunledger processing tun0
    """
    found = remote.get(f"/interfaces/{segment(name)}/processing")
    if remote.json:
        show.emit_json(found)
        return
    click.echo(
        f"{name}: running, offloads {'on' if found['offloads']['active'] else 'off'}"
        if found["running"]
        else f"{name}: stopped"
        if found["reason"] is None
        else f"{name}: on, but nobody reads its packets: {found['reason']}"
    )
    rows = [
        [
            str(place),
            stage["processor"],
            "bypassed" if stage["bypassed"] else "at work",
            f"{stage['packets_in']:,}",
            f"{stage['packets_out']:,}",
            " ".join(f"{key}={value}" for key, value in stage["figures"].items() if value),
        ]
        for place, stage in enumerate(found["stages"])
    ]
    if rows:
        show.table(("STAGE", "PROCESSOR", "STATE", "IN", "OUT", "FIGURES"), rows, right=("IN", "OUT"))
    for reason, count in found["drops"].items():
        click.echo(f"dropped, {reason}: {count:,}")


# -- captures


@click.group()
def capture() -> None:
    """Packets as pcapng: into files of the service, or live.

    \b
    Examples:
      tunledger capture start tun0 --max-packets 1000
      tunledger capture get tun0 ID > x.pcapng
      tunledger capture stream tun0 | tcpdump -n -r -
      tunledger capture stream tun0 | wireshark -k -i -
    """


def _limits(function: Command) -> Command:
    options = [
        click.option("--snaplen", type=int, help="Octets kept of each packet."),
        click.option(
            "--size", "size_bytes", type=int, metavar="BYTES", help="Begin the next file after so many; 64 MiB."
        ),
        click.option(
            "--interval", "interval_s", type=int, metavar="SECONDS", help="Begin the next file after so long."
        ),
        click.option("--files", type=int, help="Keep so many, the latest; 4 by default."),
        click.option("--max-packets", type=int, help="End after so many."),
        click.option("--max-bytes", type=int, help="End after so many octets written."),
        click.option("--max-seconds", type=int, help="End after so long."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@capture.command(name="start")
@remote_options
@name_argument
@_limits
@write_options("reason")
def capture_start(remote: Remote, write: Write, name: str, **limits: int | None) -> None:
    """Begin to write the packets of NAME into files; prints the capture's id."""
    given = {key: value for key, value in limits.items() if value is not None}
    found = _order(remote, "POST", f"/interfaces/{segment(name)}/captures", given, write.headers())
    if remote.json:
        show.emit_json(found)
    else:
        click.echo(found["id"])


@capture.command(name="stop")
@remote_options
@name_argument
@click.argument("capture_id")
def capture_stop(remote: Remote, name: str, capture_id: str) -> None:
    """End a capture; its files stay."""
    _show(remote, [_order(remote, "POST", f"{_where(name, capture_id)}/stop", None)])


@capture.command(name="delete")
@remote_options
@name_argument
@click.argument("capture_id")
def capture_delete(remote: Remote, name: str, capture_id: str) -> None:
    """End a capture, and delete its files."""
    found = _order(remote, "DELETE", _kept(remote, name, capture_id)[0], None)
    if remote.json:
        show.emit_json(found)
    else:
        click.echo(f"capture {capture_id} deleted")


@capture.command(name="list")
@remote_options
@click.argument("name", required=False, shell_complete=complete_names)
def capture_list(remote: Remote, name: str | None) -> None:
    """The captures of NAME or of all, under way and over, also of interfaces that are no more."""
    found = remote.get("/captures", name=name)["captures"]
    if name is not None and not found:
        found = remote.get(f"/interfaces/{segment(name)}/captures")["captures"]  # refused if there is none of that name
    _show(remote, found)


@capture.command(name="get")
@remote_options
@name_argument
@click.argument("capture_id")
@click.option("--file", "number", type=click.IntRange(0), help="Which; by default the latest.")
@click.option("--write", "-w", "path", type=click.Path(path_type=Path), help="Where to; by default standard output.")
def capture_get(remote: Remote, name: str, capture_id: str, number: int | None, path: Path | None) -> None:
    """Fetch a file of a capture, also while it is being written."""
    where, files = _kept(remote, name, capture_id)
    if number is None:
        if not files:
            fail(f"{capture_id} has no file")
        number = files[-1]["number"]
    octets = remote.client.octets(f"/api/v1{where}/files/{number}", {})
    if path is None:
        _pour(octets)
    else:
        try:
            with path.open("xb") as file:
                for each in octets:
                    file.write(each)
        except CallError as error:
            path.unlink(missing_ok=True)  # it was not there before, and is not the whole one
            refused(error)
        except OSError as error:
            fail(f"{path}: {error.strerror}", USAGE)


@capture.command(name="stream")
@remote_options
@name_argument
@click.option("--snaplen", type=int, help="Octets kept of each packet.")
@write_options("reason")
def capture_stream(remote: Remote, write: Write, name: str, snaplen: int | None) -> None:
    """The packets of NAME live, as pcapng on standard output; ^C ends it."""
    params = {} if snaplen is None else {"snaplen": snaplen}
    _pour(remote.client.octets(f"/api/v1/interfaces/{segment(name)}/capture/stream", params, write.headers()))
    fail("nothing more comes: processing ended, or the service stops")


def _pour(octets: Iterator[bytes]) -> None:
    """To standard output as they come; a terminal is no place for them."""
    if sys.stdout.isatty():
        fail("pcapng is not for a terminal: pipe it, as in | tcpdump -n -r -", USAGE)
    try:
        for each in octets:
            sys.stdout.buffer.write(each)
            sys.stdout.buffer.flush()
    except CallError as error:
        refused(error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _kept(remote: Remote, name: str, capture_id: str) -> tuple[str, list[Any]]:
    """Where a capture of NAME is, which may be no more, and its files."""
    where = f"/captures/{segment(capture_id)}"
    found = remote.get(where)
    if found["name"] != name:
        fail(f"capture {capture_id} is of {found['name']}, not of {name}")
    return where, found["files"]


def _where(name: str, capture_id: str) -> str:
    return f"/interfaces/{segment(name)}/captures/{segment(capture_id)}"


def _order(remote: Remote, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
    try:
        return remote.client.call(method, f"/api/v1{path}", body=body, headers=headers).body
    except CallError as error:
        refused(error)


def _show(remote: Remote, found: list[dict[str, Any]]) -> None:
    if remote.json:
        show.emit_json(found)
        return
    rows = [
        [
            each["id"],
            each["state"] if each["reason"] is None else f"{each['state']} ({each['reason']})",
            show.when(each["started_at"]),
            *(f"{each[key]:,}" for key in ("packets", "bytes", "dropped")),
            " ".join(str(file["number"]) for file in each["files"]),
        ]
        for each in found
    ]
    numbers = ("PACKETS", "BYTES", "DROPPED")
    show.table(("CAPTURE", "STATE", "STARTED", *numbers, "FILES"), rows, right=numbers)


COMMANDS = (tail, flows, packets, capture, processing)

"""The commands on interfaces one by one: list, show, create, set, delete, start, stop."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from service.cli import planned, show
from service.cli.client import Answer
from service.cli.options import (
    USAGE,
    Command,
    Remote,
    Write,
    complete_names,
    fail,
    name_argument,
    remote_options,
    segment,
    write_options,
)
from service.domain.chain import BUILT_IN, shown

NONE = "none"  # what takes a field back to nothing on the command line


def _labels(_: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """k=v, ... as a mapping; "k=" maps k to nothing."""
    found: dict[str, str] = {}
    for label in given:
        key, separator, text = label.partition("=")
        if not key or not separator:
            raise click.BadParameter(f"{label!r} is not a label such as lab=north", param=option)
        if key in found:
            raise click.BadParameter(f"{key} is given twice", param=option)
        found[key] = text
    return found


def _account(_: click.Context, __: click.Parameter, given: str | None) -> str | int | None:
    """A user or group: by number, or by name as the service's host knows it."""
    return int(given) if given is not None and given.isascii() and given.isdigit() else given


_LISTS = {"networks", "answers"}  # options whose values stand between plus signs


def _stages(_: click.Context, option: click.Parameter, given: Sequence[str]) -> list[dict[str, Any]] | None:
    """inspect, forward:to=tun1, ... as a chain; "none" alone is an empty one."""
    if not given:
        return None
    return [] if tuple(given) == (NONE,) else [_stage(each, option) for each in given]


def _stage(text: str, option: click.Parameter) -> dict[str, Any]:
    processor, _, rest = text.partition(":")
    found: dict[str, Any] = {"processor": processor}
    for part in rest.split(",") if rest else ():
        key, separator, value = part.partition("=")
        if not key or not separator:
            raise click.BadParameter(f"{part!r} is not an option such as to=tun1", param=option)
        if key in found:
            raise click.BadParameter(f"{key} is given twice", param=option)
        if key in _LISTS:
            found[key] = value.split("+")
        elif processor == "balance" and key == "to":
            found[key] = [_share(each, option) for each in value.split("+")]
        else:
            found[key] = _value(value)
    return found


def _share(text: str, option: click.Parameter) -> dict[str, Any]:
    to, star, weight = text.partition("*")
    if star and not (weight.isascii() and weight.isdigit()):
        raise click.BadParameter(f"{text!r} is not an interface and a weight such as tun1*3", param=option)
    return {"to": to, **({"weight": int(weight)} if star else {})}


def _value(text: str) -> Any:
    """A number, true, false or null as that; anything else is text."""
    match text:
        case "true" | "false":
            return text == "true"
        case "null":
            return None
        case _:
            digits = text.removeprefix("-")
            return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 17 else text


def _chain(_: click.Context, option: click.Parameter, given: str | None) -> Any:
    """A chain as JSON."""
    if given is None:
        return None
    try:
        found = json.loads(given)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param=option) from None
    if not isinstance(found, list):
        raise click.BadParameter('expected a list such as [{"processor": "inspect"}]', param=option)
    return found


def _complete_processors(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    if incomplete.startswith("forward:to=") or ":" in incomplete:
        return []
    names = {"forward": "forward:to=", "balance": "balance:to=", "reply": "reply:networks="}
    return [names.get(name, name) for name in BUILT_IN if name.startswith(incomplete)]


def spec_options(function: Command) -> Command:
    """The fields of a spec; each is None if it was not given."""
    options = [
        click.option("--mode", type=click.Choice(["tun", "tap"]), help="IP packets or Ethernet frames."),
        click.option("--address", "addresses", metavar="CIDR", multiple=True, help="10.0.0.1/24; may be repeated."),
        click.option("--mtu", type=int, help="Bytes."),
        click.option("--up/--down", default=None, help="The admin state."),
        click.option("--txqueuelen", type=int, help="Packets the kernel keeps for the reader."),
        click.option("--owner", callback=_account, help="User who may open the device, by name or number."),
        click.option("--group", callback=_account, help="Group that may open the device, by name or number."),
        click.option("--multi-queue/--single-queue", default=None, help="Several readers at once."),
        click.option("--mac", help="Hardware address of a tap."),
        click.option("--start/--stop", "running", default=None, help="Whether the service's workers read it."),
        click.option(
            "--processor",
            "processors",
            metavar="NAME[:K=V,...]",
            multiple=True,
            callback=_stages,
            shell_complete=_complete_processors,
            help="A stage of its chain: inspect, forward:to=tun1, ...; may be repeated, in order.",
        ),
        click.option("--chain", metavar="JSON", callback=_chain, help="The whole chain, as the API takes it."),
        click.option(
            "--offloads", type=click.Choice(["auto", "off"]), help="Segments of up to 64 KiB, or as on a wire."
        ),
        click.option("--netns", help="The network namespace it lives in, as ip netns knows it."),
        click.option("--drift", type=click.Choice(["repair", "report"]), help="What to do when others change it."),
        click.option("--description", help="A line for people."),
        click.option("--label", "labels", metavar="K=V", multiple=True, callback=_labels, help="May be repeated."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON form of the options that were given."""
    found: dict[str, Any] = {}
    if given["processors"] is not None and given["chain"] is not None:
        fail("--chain gives the whole chain; --processor does not go with it", USAGE)
    for key, value in given.items():
        if value is None or value == () or value == {}:
            continue
        match key:
            case "running" | "offloads":
                found.setdefault("processing", {})[key] = value
            case "processors" | "chain":
                found.setdefault("processing", {})["chain"] = value
            case "addresses":
                found[key] = [] if value == (NONE,) else list(value)
            case "owner" | "group" | "mac" | "netns":
                found[key] = None if value == NONE else value
            case _:
                found[key] = value
    return found


# -- reading


@click.command(name="list")
@remote_options
@click.argument("pattern", required=False, shell_complete=complete_names)
@click.option("--mode", type=click.Choice(["tun", "tap"]), help="Of this mode only.")
@click.option("--state", type=click.Choice(["pending", "applied", "degraded"]), help="In this state only.")
@click.option("--label", "labels", metavar="K[=V]", multiple=True, help="With this label; may be repeated.")
def list_interfaces(
    remote: Remote, pattern: str | None, mode: str | None, state: str | None, labels: tuple[str, ...]
) -> None:
    """The interfaces, or those whose name matches PATTERN.

    \b
    Examples:
      tunledger list
      tunledger list 'lab-*' --state degraded
      tunledger list --label lab=north -o json
    """
    found = remote.pages("/interfaces", "interfaces", name=pattern, mode=mode, state=state, label=labels or None)
    if remote.json:
        show.emit_json(found)
    else:
        show_list(found)


def show_list(found: Sequence[Mapping[str, Any]]) -> None:
    """Interfaces as a table."""
    if not found:
        click.echo("no interfaces")
        return
    columns = ("NAME", "MODE", "ADDRESSES", "MTU", "UP", "PROCESSING", "STATE", "GENERATION", "LABELS")
    show.table(columns, [_row(interface) for interface in found], right=("MTU", "GENERATION"))


def _row(interface: Mapping[str, Any]) -> list[str]:
    spec = interface["spec"]
    if spec is None:  # its first command is still under way
        return [interface["name"], "", "", "", "", "", _state(interface["status"]), str(interface["generation"]), ""]
    return [
        spec["name"],
        spec["mode"],
        " ".join(spec["addresses"]),
        str(spec["mtu"]),
        "yes" if spec["up"] else "no",
        "running" if spec["processing"]["running"] else "stopped",
        _state(interface["status"]),
        str(interface["generation"]),
        " ".join(f"{key}={value}" for key, value in spec["labels"].items()),
    ]


def _state(status: Mapping[str, Any]) -> str:
    more = f" ({status['reason']})" if status["reason"] else ""
    awaits = " (to be confirmed)" if status["awaiting_confirmation"] else ""
    return f"{status['state']}{more}{awaits}"


@click.command(name="show")
@remote_options
@name_argument
def show_interface(remote: Remote, name: str) -> None:
    """One interface: what is desired of it, and what is known of it.

    \b
    Examples:
      tunledger show tun0
      tunledger show tun0 -o json
    """
    answer = remote.read(f"/interfaces/{segment(name)}")
    if remote.json:
        show.emit_json(answer.body)
        return
    spec, status = answer.body["spec"], answer.body["status"]
    observed = status["observed"] or {}
    if observed and not observed["processing"]["running"]:  # then nothing is applied that could differ
        observed = {**observed, "processing": {**spec["processing"], "running": False}}
    awaiting = status["awaiting_confirmation"]
    tried = f"{status['attempts']} attempt{'' if status['attempts'] == 1 else 's'}"
    retry = f"in {status['retry_in_s']} s, after {tried}" if status["retry_in_s"] else ""
    rows = [
        ("name", spec["name"]),
        ("state", _state(status)),
        ("retried", retry),
        ("since", show.when(status["since"])),
        ("pending", status["command_id"] or ""),
    ]
    if awaiting:
        rows.append(("confirm", f"by {show.when(awaiting['confirm_by'])}: tunledger confirm {awaiting['command_id']}"))
    rows += [
        (key, _desired(spec[key], observed.get(key, spec[key])))
        for key in spec
        if key not in {"name", "description", "labels"}
    ]
    link = f"ifindex {status['ifindex']}, {status['operstate']}" if status["ifindex"] is not None else "none"
    rows += [
        ("description", spec["description"]),
        ("labels", "\n".join(f"{key}={text}" for key, text in spec["labels"].items())),
        ("link", link),
        ("declared", show.when(status["declared_at"])),
        ("id", answer.body["id"]),
        ("generation", str(answer.body["generation"])),
        ("etag", answer.headers.get("etag", "").strip('"')),
    ]
    for source, totals in status["counters"].items():
        rows += [(f"{source} {counter}", f"{total:,}") for counter, total in totals.items() if total]
    show.fields(rows)


def _desired(desired: Any, observed: Any) -> str:
    """A value as it is desired; beside it what is observed, if that differs."""
    if desired is None:
        return "" if observed is None else f"{_plain(observed)} (the kernel's choice)"
    return _plain(desired) if desired == observed else f"{_plain(desired)}, observed {_plain(observed)}"


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "running" in value:
        chain = value.get("chain", ())
        return ("running" if value["running"] else "stopped") + (f": {shown(chain)}" if chain else "")
    return show.value(value)


# -- writing


@click.command()
@remote_options
@click.argument("name")
@spec_options
@write_options("reason", "confirm_within", "dry_run", "allow_overlap")
def create(remote: Remote, write: Write, name: str, **options: Any) -> None:
    """Make the interface NAME.

    \b
    Examples:
      tunledger create tun0 --address 10.0.0.1/24 --mtu 1400 --start
      tunledger create tap0 --mode tap --owner alice --label lab=north
      tunledger create tun1 --address 2001:db8::1/64 --dry-run
      tunledger create tun2 --start --processor inspect --processor forward:to=tun1
      tunledger create lab0 --start --processor reply:networks=10.64.0.0/20
    """
    _refuse_empty_labels(options["labels"])
    body = {"name": name, **_fields(options)}
    answer = remote.write("POST", "/interfaces", write, body)
    report(remote, write, answer, [f"{name} created"])


@click.command(name="set")
@remote_options
@name_argument
@spec_options
@click.option("--add-address", "added", metavar="CIDR", multiple=True, help="One more; may be repeated.")
@click.option("--remove-address", "removed", metavar="CIDR", multiple=True, help="One less; may be repeated.")
@write_options("reason", "confirm_within", "dry_run", "if_match", "allow_overlap", "recreate")
def set_interface(
    remote: Remote, write: Write, name: str, added: tuple[str, ...], removed: tuple[str, ...], **options: Any
) -> None:
    """Change the interface NAME in place. What is not given stays as it is.

    --address replaces all addresses and --processor all stages (none takes them away), --label k=
    removes a label, and none as --owner, --group, --mac or --netns leaves that to the kernel.

    \b
    Examples:
      tunledger set tun0 --mtu 1400 --reason "PPPoE uplink"
      tunledger set tun0 --add-address 10.9.0.1/24 --remove-address 10.0.0.1/24
      tunledger set tun0 --down --confirm-within 60
      tunledger set tun0 --label lab=south --label owner= --dry-run
      tunledger set tun0 --processor inspect --processor capture:files=10
      tunledger set tun0 --processor none
    """
    labels = options.pop("labels")
    patch = _fields(options)
    if labels:
        patch["labels"] = {key: text or None for key, text in labels.items()}
    if added or removed:
        if "addresses" in patch:
            fail("--address gives all addresses; --add-address and --remove-address do not go with it", USAGE)
        patch["addresses"], etag = _addresses(remote, name, added, removed)
        write = Write(
            reason=write.reason,
            confirm_within=write.confirm_within,
            dry_run=write.dry_run,
            if_match=write.if_match or etag,  # nobody else's change of the addresses may get lost
            allow_overlap=write.allow_overlap,
            recreate=write.recreate,
        )
    if not patch:
        fail(f"nothing to change on {name}; see tunledger set --help", USAGE)
    answer = remote.write("PATCH", f"/interfaces/{segment(name)}", write, patch)
    report(remote, write, answer, [f"{name} changed"])


def _addresses(remote: Remote, name: str, added: Sequence[str], removed: Sequence[str]) -> tuple[list[str], str | None]:
    answer = remote.read(f"/interfaces/{segment(name)}")
    present: list[str] = answer.body["spec"]["addresses"]
    for address in removed:
        if _normal(address) not in present:
            fail(f"{name} has no address {address}; it has {', '.join(present) or 'none'}")
    taken = {_normal(address) for address in removed}
    kept = [address for address in present if address not in taken]
    return [*kept, *(address for address in added if _normal(address) not in kept)], answer.headers.get("etag")


def _normal(address: str) -> str:
    """An address as the service writes it; what is none is left for the service to refuse."""
    from ipaddress import ip_interface

    try:
        return str(ip_interface(address))
    except ValueError:
        return address


@click.command()
@remote_options
@click.argument("names", nargs=-1, required=True, shell_complete=complete_names)
@write_options("reason", "confirm_within", "dry_run", "if_match")
def delete(remote: Remote, write: Write, names: tuple[str, ...]) -> None:
    """Remove interfaces for good, all of them or none. Their history stays.

    \b
    Examples:
      tunledger delete tun0 --reason "lab is over"
      tunledger delete tun1 tun2 tun3
    """
    if len(names) == 1:
        answer = remote.write("DELETE", f"/interfaces/{segment(names[0])}", write)
    else:
        if write.if_match is not None:
            fail("--if-match goes with one interface", USAGE)
        body = {"commands": [{"delete": {"name": name}} for name in names]}
        answer = remote.write("POST", "/batch", write, body)
    report(remote, write, answer, [f"{name} deleted" for name in names])


@click.command()
@remote_options
@name_argument
@write_options("reason", "confirm_within", "dry_run", "if_match")
def start(remote: Remote, write: Write, name: str) -> None:
    """Let the service's workers read and count the packets of NAME.

    \b
    Example:
      tunledger start tun0
    """
    answer = remote.write("POST", f"/interfaces/{segment(name)}/start", write)
    report(remote, write, answer, [f"{name}: processing started"])


@click.command()
@remote_options
@name_argument
@write_options("reason", "confirm_within", "dry_run", "if_match")
def stop(remote: Remote, write: Write, name: str) -> None:
    """Take NAME from the workers, so that others may open it.

    \b
    Example:
      tunledger stop tun0 --reason "tcpdump needs it"
    """
    answer = remote.write("POST", f"/interfaces/{segment(name)}/stop", write)
    report(remote, write, answer, [f"{name}: processing stopped"])


def _refuse_empty_labels(labels: Mapping[str, str]) -> None:
    for key, text in labels.items():
        if not text:
            fail(f"--label {key}=: there is nothing to remove from a new interface", USAGE)


def report(remote: Remote, write: Write, answer: Answer, done: Sequence[str]) -> None:
    """Say what came of a write: what was done, or what would be."""
    command_id = answer.headers.get("tunledger-command-id")
    if remote.json:
        show.emit_json(answer.body if command_id is None else {"command_id": command_id, **answer.body})
        return
    if write.dry_run:
        planned.tell(planned.ordered(answer.body))
        click.echo(planned.DRY_RUN)
        return
    for line in done:
        click.echo(line)
    click.echo(show.styled(f"command {command_id}", dim=True))
    for interface in answer.body.get("interfaces", [answer.body]):
        if (status := interface.get("status")) is not None and status["state"] == "degraded":
            text = f"tunledger: {interface['spec']['name']} is degraded: {status['reason']}"
            click.echo(show.styled(text, fg="yellow"), err=True)
    if write.confirm_within is not None:
        click.echo(f"taken back in {write.confirm_within} s, unless: tunledger confirm {command_id}")


COMMANDS = (list_interfaces, show_interface, create, set_interface, delete, start, stop)

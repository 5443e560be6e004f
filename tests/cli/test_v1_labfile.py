"""The file of apply and export: strict, each mistake with its place; what is written reads back as it was."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.cli import labfile
from service.domain.decide import merged
from service.domain.spec import InterfaceSpec, parse_spec, spec_to_json
from service.domain.values import InterfaceName

WHOLE = {
    "name": "tap1",
    "mode": "tap",
    "addresses": ["10.0.0.1/24", "fd00::1/64"],
    "mtu": 1400,
    "up": False,
    "txqueuelen": 500,
    "owner": 1000,
    "group": 100,
    "multi_queue": True,
    "mac": "02:00:00:00:00:01",
    "netns": "north",
    "processing": {
        "running": True,
        "chain": [
            {"processor": "inspect", "on_crash": "restart", "flows": 4096, "packets": 64},
            {"processor": "forward", "on_crash": "bypass", "to": "tun0"},
        ],
        "offloads": "off",
    },
    "drift": "report",
    "description": "where it hangs: über #1",
    "labels": {"lab": "north", "on": "yes", "port": "0800"},
}


def _problem(text: str, name: str = "lab.yaml") -> str:
    with pytest.raises(labfile.FileError) as caught:
        labfile.read(text.encode(), name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 'expected "interfaces" with a list beneath it, found null'),
        ("- name: tun0", "found a list"),
        ("interface: []", "found a mapping without that"),
        ("interfaces: {name: tun0}", "found a mapping without that"),
        ("interfaces: []\nprune: true", "prune: unknown field; known here: interfaces"),
        ("interfaces: [tun0]", "interfaces.0: a string where an interface such as {name: tun0} belongs"),
        ("interfaces: [{mtu: 1400}]", 'interfaces.0.name: missing; expected one such as "tun0"'),
        ("interfaces: [{name: tun0, mtu: 70000}]", "interfaces.0 (tun0).mtu: 70000 is out of range"),
        ("interfaces: [{name: tun0, mtu: '1400'}]", 'interfaces.0 (tun0).mtu: "1400" is not a whole number'),
        ("interfaces: [{name: tun0, mtu: 0600}]", 'interfaces.0 (tun0).mtu: "0600" is not a whole number'),
        ("interfaces: [{name: tun0, mtux: 1}]", "interfaces.0 (tun0).mtux: unknown field; known here: name, mode"),
        ("interfaces: [{name: tun0, addresses: [10.0.0.1/24, x]}]", "interfaces.0 (tun0).addresses.1: "),
        ("interfaces: [{name: tun0, up: yes}]", 'interfaces.0 (tun0).up: "yes" is not true or false'),
        ("interfaces: [{name: tun0, owner: no-such-user}]", "is no user of this host"),
        ("interfaces: [{name: tun0}, {name: tun1}, {name: tun0}]", "interfaces.2.name: tun0 is there already, as in"),
        ("interfaces:\n  - name: tun0\n    mtu: 1400\n    mtu: 1500\n", "lab.yaml:4:5: mtu: given twice"),
        ("interfaces: [{name: tun0, labels: {1: x}}]", "lab.yaml:1:36: 1: a key is text"),
        (
            "interfaces: [{name: tun0, processing: {chain: [{processor: forward}]}}]",
            "interfaces.0 (tun0).processing.chain.0.to: missing",
        ),
        ("interfaces: [{name: tun0, netns: a/b}]", "interfaces.0 (tun0).netns: "),
        ("interfaces: [", "lab.yaml:1:14: "),
        ("interfaces: []\n---\ninterfaces: []", "lab.yaml:2:1: "),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("\x00", "not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(text: str, words: str) -> None:
    problem = _problem(text)
    assert problem.startswith("lab.yaml:")
    assert words in problem


def test_json_is_as_strict() -> None:
    assert _problem('{"interfaces": [', "lab.json").startswith("lab.json:1:17: not JSON")
    assert _problem('{"interfaces": [{"name": "a", "name": "b"}]}', "lab.json") == "lab.json: name: given twice"


def test_all_mistakes_are_told_at_once() -> None:
    problems = _problem("interfaces: [{name: tun0, mtu: 1}, {name: tun1}, {name: 'x y'}]").splitlines()
    assert [problem.split(":")[1] for problem in problems] == [" interfaces.0 (tun0).mtu", " interfaces.2.name"]


def test_a_file_over_the_limit_is_refused() -> None:
    assert "over" in _problem("#" * (labfile.FILE_MAX_BYTES + 1))


def test_yaml_is_read_without_its_traps() -> None:
    (spec,) = labfile.read(
        b"interfaces: [{name: tap1, mode: tap, mac: 12:34:56:12:34:56, labels: {on: no, time: 12:30, v: 1.10.1}}]", "x"
    )
    assert spec.mac == "12:34:56:12:34:56"
    assert spec.labels == {"on": "no", "time": "12:30", "v": "1.10.1"}


def test_a_null_is_a_field_not_given_and_owners_have_names() -> None:
    (spec,) = labfile.read(b"interfaces: [{name: tun0, mtu: null, owner: root, group: root}]", "x")
    assert spec == InterfaceSpec(name=InterfaceName("tun0"), owner=0, group=0)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_what_is_written_reads_back(form: str) -> None:
    present = [WHOLE, spec_to_json(parse_spec({"name": "tun0"})), spec_to_json(parse_spec({"name": "1e3"}))]
    text = labfile.write(present, form)
    assert [spec_to_json(spec) for spec in labfile.read(text.encode(), f"lab.{form}")] == present


@pytest.mark.parametrize("form", ["yaml", "json"])
@given(text=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=40).filter(str.isprintable))
@example(text="no").via("YAML 1.1 takes it for false")
@example(text="0800").via("looks like a number")
@example(text="12:30:00").via("YAML 1.1 takes it for seconds")
@example(text="1_000.5").via("YAML 1.1 takes it for a number")
@example(text="a: b # c").via("looks like YAML")
def test_any_text_reads_back(form: str, text: str) -> None:
    spec = spec_to_json(parse_spec({"name": "tun0", "description": text, "labels": {"x": text}}))
    assert [spec_to_json(each) for each in labfile.read(labfile.write([spec], form).encode(), f"lab.{form}")] == [spec]


def test_an_export_leaves_out_what_is_so_by_itself() -> None:
    text = labfile.write([spec_to_json(parse_spec({"name": "tun0", "description": "x"}))], "json")
    assert json.loads(text) == {
        "interfaces": [{"name": "tun0", "mode": "tun", "addresses": [], "mtu": 1500, "description": "x"}]
    }


# -- what would make it so


def _wanted(*documents: dict[str, object]) -> list[InterfaceSpec]:
    return [parse_spec(document) for document in documents]


def test_nothing_is_ordered_where_all_is_as_it_should_be() -> None:
    assert labfile.commands(_wanted(WHOLE), {"tap1": WHOLE}, prune=True) == []


def test_create_change_and_delete_in_one_batch_with_deletes_first() -> None:
    present = {"tap1": WHOLE, "old0": WHOLE | {"name": "old0"}}
    wanted = _wanted(
        WHOLE | {"mtu": 1500, "mac": None, "labels": {"lab": "south", "on": "yes"}, "processing": {}},
        {"name": "tun9", "mtu": 1500, "addresses": ["10.9.0.1/24"]},
    )
    create = {"create": {"name": "tun9", "addresses": ["10.9.0.1/24"]}}
    patch: dict[str, object] = {"mtu": 1500, "mac": None, "labels": {"lab": "south", "port": None}}
    patch |= {"processing": {"running": False, "chain": [], "offloads": "auto"}}
    change = {"change": {"name": "tap1", "patch": patch}}
    assert labfile.commands(wanted, present, prune=True) == [{"delete": {"name": "old0"}}, change, create]
    assert labfile.commands(wanted, present, prune=False) == [change, create]


_labels = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "1", "2"]))
_specs = st.builds(
    lambda mtu, owner, mac, running, labels: spec_to_json(
        parse_spec(
            {
                "name": "tap0",
                "mode": "tap",
                "mtu": mtu,
                "owner": owner,
                "mac": mac,
                "processing": {"running": running, "chain": [], "offloads": "auto"},
                "labels": labels,
            }
        )
    ),
    st.sampled_from([1400, 1500]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([None, "02:00:00:00:00:01"]),
    st.booleans(),
    _labels,
)


@given(_specs, _specs)
def test_a_merge_patch_makes_one_spec_of_the_other_by_the_service_s_own_rules(old: object, new: object) -> None:
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    patch = labfile.merge_patch(old, new)
    assert spec_to_json(parse_spec(merged(old, patch))) == new
    assert (patch == {}) == (old == new)

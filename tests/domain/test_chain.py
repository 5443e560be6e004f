"""Chains of processors: what users write, made whole, or refused by the name of the field."""

from collections.abc import Iterator
from typing import Any

import pytest

from service.domain.chain import BUILT_IN, STAGES_MAX, custom, parse_chain, shown, targets
from service.domain.errors import COMPARED_MAX, SHOWN_MAX, ErrorCode, TunledgerError, first_close
from service.domain.errors import shown as shown_json
from service.domain.spec import parse_spec, spec_to_json


def stage(**fields: Any) -> Any:
    return parse_chain([fields], "chain")[0]


def test_defaults_are_filled_in_so_that_equal_stages_compare_equal() -> None:
    assert stage(processor="inspect") == stage(processor="inspect", flows=4096, packets=64, on_crash="restart")
    assert stage(processor="filter", rules=[{"action": "drop", "port": 53}])["rules"] == [
        {
            "action": "drop",
            "direction": "both",
            "network": None,
            "source": None,
            "destination": None,
            "protocol": None,
            "port": "53",
            "source_port": None,
            "destination_port": None,
            "rate_pps": None,
        }
    ]
    assert stage(processor="balance", to=[{"to": "tun1"}])["to"] == [{"to": "tun1", "weight": 1}]


def test_a_chain_that_was_read_parses_to_itself() -> None:
    chain = [
        {"processor": "inspect"},
        {"processor": "capture", "snaplen": 96},
        {"processor": "reply", "networks": ["10.1.0.0/16", "fd00::/64"]},
        {"processor": "my-own", "words": ["a", {"deep": None}], "limit": 2**53 - 1},
        {"processor": "balance", "to": [{"to": "tun1", "weight": 3}, {"to": "tun2"}]},
    ]
    spec = parse_spec({"name": "tun0", "processing": {"running": True, "chain": chain}})
    assert parse_spec(spec_to_json(spec)) == spec
    assert targets(spec.processing.chain) == {"tun1", "tun2"}
    assert custom(spec.processing.chain) == {"my-own"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "chain.0.processor"),
        ({"processor": "Inspect"}, "chain.0.processor"),
        ({"processor": "inspect", "on_crash": "ignore"}, "chain.0.on_crash"),
        ({"processor": "inspect", "flow": 1}, "chain.0.flow"),
        ({"processor": "inspect", "flows": 1}, "chain.0.flows"),
        ({"processor": "forward"}, "chain.0.to"),
        ({"processor": "forward", "to": "a/b"}, "chain.0.to"),
        ({"processor": "balance", "to": []}, "chain.0.to"),
        ({"processor": "balance", "to": [{"to": "a"}, {"to": "a"}]}, "chain.0.to"),
        ({"processor": "balance", "to": [{"to": "a", "weight": 0}]}, "chain.0.to.0.weight"),
        ({"processor": "reply", "networks": ["10.0.0.1/8"]}, "chain.0.networks.0"),
        ({"processor": "reply", "networks": []}, "chain.0.networks"),
        ({"processor": "filter", "rules": [{"action": "pass", "port": "70000"}]}, "chain.0.rules.0.port"),
        ({"processor": "filter", "rules": [{"action": "pass", "port": "9-1"}]}, "chain.0.rules.0.port"),
        ({"processor": "filter", "rules": [{"action": "pass", "protocol": "sctp"}]}, "chain.0.rules.0.protocol"),
        ({"processor": "filter", "rules": [{}]}, "chain.0.rules.0.action"),
        ({"processor": "capture", "size_bytes": None}, "chain.0.files"),
        ({"processor": "my-own", "ratio": 0.5}, "chain.0.ratio"),
        ({"processor": "my-own", "big": 2**53}, "chain.0.big"),
        ({"processor": "my-own", "deep": [[[[[[1]]]]]]}, "chain.0.deep.0.0.0.0.0"),
        ({"processor": "my-own", "Odd Key": 1}, "chain.0"),
        ({"processor": "my-own", "long": "x" * 9000}, "chain.0"),
    ],
)
def test_a_bad_stage_is_refused_by_the_name_of_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(TunledgerError) as refusal:
        stage(**fields)
    assert (refusal.value.code, refusal.value.field) == (ErrorCode.INVALID_FIELD, field)


def test_a_chain_has_a_bound_and_does_not_lead_back_to_itself() -> None:
    with pytest.raises(TunledgerError, match="at most 16"):
        parse_chain([{"processor": "inspect"}] * (STAGES_MAX + 1), "chain")
    with pytest.raises(TunledgerError, match="cannot forward to itself"):
        parse_spec({"name": "tun0", "processing": {"chain": [{"processor": "forward", "to": "tun0"}]}})


def test_every_processor_of_ours_parses_with_what_it_needs() -> None:
    needed: dict[str, dict[str, Any]] = {
        "reply": {"networks": ["10.0.0.0/8"]},
        "forward": {"to": "tun1"},
        "balance": {"to": [{"to": "tun1"}]},
    }
    for processor, options in BUILT_IN.items():
        assert set(stage(processor=processor, **needed.get(processor, {}))) == {"processor", "on_crash", *options}


def test_a_chain_is_shown_as_it_is_written_on_the_command_line() -> None:
    chain = parse_chain(
        [
            {"processor": "inspect"},
            {"processor": "reply", "networks": ["10.0.0.0/24", "fd00::/64"]},
            {"processor": "my-own", "limit": 3, "deep": {"a": [1]}, "on_crash": "bypass"},
        ],
        "chain",
    )
    wanted = 'inspect > reply:networks=10.0.0.0/24+fd00::/64 > my-own:on_crash=bypass,limit=3,deep={"a":[1]}'
    assert shown(chain) == wanted
    assert shown([]) == "none"


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (
            {"processor": "inspect"},
            ': {"processor": "inspect"} is not a list of stages such as [{"processor": "inspect"}]',
        ),
        (
            [{"procesor": "inspect"}],
            '.0.processor: missing in {"procesor": "inspect"}; it names one, ours are inspect, ',
        ),
        ([{"procesor": "inspect"}], "; did you mean processor?"),
        (
            [{"processor": "inspect", "flow": 9}],
            ".0.flow: unknown field; known here: flows, packets; did you mean flows?",
        ),
        (
            [{"processor": "filter", "rules": {"a": True}}],
            '.0.rules: {"a": true} is not a list of rules such as {"action"',
        ),
        (
            [{"processor": "filter", "rules": [{"port": 25}]}],
            ".0.rules.0.action: missing; it is needed; given here: port",
        ),
        ([{"processor": "inspect", "on_crash": ["x"] * 99}], '.0.on_crash: ["x", "x", "x"'),
        ([{"processor": "balance", "to": []}], ".0.to: [] is empty; expected 1 to 64 of outputs such as "),
        (
            [{"processor": "reply", "networks": ["10.1.0.0/8"]}],
            '"10.1.0.0/8" has bits behind its prefix; expected "10.0.0.0/8"',
        ),
        ([{"processor": "inspect"}] * 17, ": 17 stages are too many; at most 16"),
        ([{"processor": "forward", "to": {"b": "\u202e"}}], '.0.to: {"b": "\\u202e"} is not a string'),
    ],
)
def test_a_refusal_names_the_place_what_was_given_as_json_and_what_would_do(chain: Any, words: str) -> None:
    with pytest.raises(TunledgerError) as refused:
        parse_chain(chain, "processing.chain")
    assert refused.value.message.startswith("processing.chain")
    assert words in refused.value.message
    assert len(refused.value.message) < 300
    assert str(refused.value.field).startswith("processing.chain")


def test_of_much_that_is_wrong_only_a_little_is_compared_and_shown() -> None:
    looked_at: list[str] = []

    def keys() -> Iterator[str]:
        for number in range(1000):
            looked_at.append(f"key{number}")
            yield looked_at[-1]

    assert first_close(keys(), ["processor"]) == ""
    assert len(looked_at) <= COMPARED_MAX
    assert shown_json(["x"] * 10**5) == ("[" + '"x", ' * 13)[:61] + "..."
    assert len(shown_json("\x00" * 10**5)) == SHOWN_MAX

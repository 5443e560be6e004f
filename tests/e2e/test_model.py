"""Any sequence of calls, of drift and of kills, beside a model of what the API promises.

The model is a dictionary from names to specs. After every step the service lists what the model says; at the end the
kernel has it, the log verifies, and folding it gives the same.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from pyroute2.iproute.linux import IPRoute

from service.domain.decide import merged
from service.domain.spec import parse_spec, spec_to_json
from tests.e2e.harness import Service, eventually, links
from tests.e2e.test_guarantees import exchange
from tests.namespace import fresh_namespace
from tests.part import share, wanted

NAMES = ("m0", "m1", "m2")
WHOLE = 60  # runs of `make test-full`
names = st.sampled_from(NAMES)
mtus = st.sampled_from([1300, 1400, 1500, 9000])
patches = st.fixed_dictionaries(
    {},
    optional={
        "mtu": mtus,
        "up": st.booleans(),
        "txqueuelen": st.sampled_from([None, 100, 1000]),
        "addresses": st.sampled_from([None, ["10.20.0.1/24"], ["10.21.0.1/16", "fd00:21::1/64"], []]),
        "processing": st.sampled_from(
            [
                {"running": True},
                {"running": False},
                {"chain": [{"processor": "inspect"}]},
                {"running": True, "chain": []},
            ]
        ),
        "description": st.sampled_from(["", "a", "ß"]),
        "labels": st.sampled_from([{"k": "v"}, {"k": None}]),
    },
)


class Machine(RuleBasedStateMachine):
    """One service over one run."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.entered = fresh_namespace()
        self.entered.__enter__()
        self.service = Service(Path(tempfile.mkdtemp(dir=self.folder))).start()
        self.model: dict[str, dict[str, Any]] = {}

    def teardown(self) -> None:
        """Look at kernel and log, and leave nothing behind."""
        try:
            self.kernel_has_what_the_model_says()
            found = self.service.verification()
            assert found.problems == []
            assert {i.name: spec_to_json(i.spec) for i in found.state.interfaces.values() if i.spec} == self.model
            assert self.service.stop() == 0
            assert set(links()) == {"lo"}
        finally:
            self.service.close()
            self.entered.__exit__(None, None, None)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        status, _headers, answer = exchange(self.service, method, f"/api/v1/{path}", body, **headers)
        assert status < 500, (status, answer)
        return status, answer

    def whole(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        return spec_to_json(parse_spec({"name": name, **spec}))

    @rule(name=names, patch=patches)
    def create(self, name: str, patch: dict[str, Any]) -> None:
        spec = merged({}, patch)
        status, answer = self.call("POST", "interfaces", {"name": name, **spec})
        if name in self.model:
            assert (status, answer["code"]) == (409, "interface_exists")
        else:
            assert status == 201, answer
            self.model[name] = self.whole(name, spec)

    @rule(name=names, patch=patches)
    def replace(self, name: str, patch: dict[str, Any]) -> None:
        spec = merged({}, patch)
        status, answer = self.call("PUT", f"interfaces/{name}", spec)
        assert status == (200 if name in self.model else 201), answer
        self.model[name] = self.whole(name, spec)

    @rule(name=names, patch=patches)
    def change(self, name: str, patch: dict[str, Any]) -> None:
        status, answer = self.call("PATCH", f"interfaces/{name}", patch)
        if name not in self.model:
            assert status == 404
        else:
            assert status == 200, answer
            self.model[name] = self.whole(name, merged(self.model[name], patch))

    @rule(data=st.data(), on=st.booleans())
    def process(self, data: st.DataObject, on: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model) or NAMES))  # else hardly any bounded run comes to start one
        status, answer = self.call("POST", f"interfaces/{name}/{'start' if on else 'stop'}")
        if name not in self.model:
            assert status == 404
        elif self.model[name]["processing"]["running"] == on:
            assert status == 409
        else:
            assert status == 200, answer
            self.model[name]["processing"]["running"] = on

    @rule(name=names)
    def delete(self, name: str) -> None:
        status, _ = self.call("DELETE", f"interfaces/{name}")
        assert status == (200 if name in self.model else 404)
        self.model.pop(name, None)

    @rule(chosen=st.lists(names, min_size=2, max_size=3, unique=True), mtu=mtus)
    def batch(self, chosen: list[str], mtu: int) -> None:
        """Valid only if all exist: all or none."""
        commands = [{"change": {"name": name, "patch": {"mtu": mtu}}} for name in chosen]
        status, answer = self.call("POST", "batch", {"commands": commands})
        if set(chosen) <= set(self.model):
            assert status == 200, answer
            for name in chosen:
                self.model[name]["mtu"] = mtu
        else:
            assert status == 404

    @rule(name=names, patch=patches)
    def dry_run(self, name: str, patch: dict[str, Any]) -> None:
        self.call("PUT", f"interfaces/{name}?dry_run=true", merged({}, patch))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drift(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        with IPRoute() as host:  # type: ignore[no-untyped-call]  # pyroute2 has no types
            index = links()[name].ifindex
            match data.draw(st.sampled_from(["gone", "mtu", "down"])):
                case "gone":
                    host.link("del", index=index)
                case "mtu":
                    host.link("set", index=index, mtu=1290)
                case _:
                    host.link("set", index=index, state="down")
        eventually(lambda: self.call("POST", "reconcile")[0] == 200 and not self.call("GET", "drift")[1]["drift"])

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        if orderly:
            assert self.service.stop() == 0
        else:
            self.service.kill()
        self.service.start()

    @invariant()
    def the_list_is_what_the_model_says(self) -> None:
        _, answer = self.call("GET", "interfaces")
        assert {i["spec"]["name"]: i["spec"] for i in answer["interfaces"]} == self.model
        assert all(i["status"]["state"] == "applied" for i in answer["interfaces"]), json.dumps(answer)

    def kernel_has_what_the_model_says(self) -> None:
        """Not an invariant: it is looked at once, at the end."""
        seen = links()
        assert set(seen) == {"lo", *self.model}
        for name, spec in self.model.items():
            link = seen[name]
            assert (link.mtu, link.up, link.txqueuelen) == (spec["mtu"], spec["up"], spec["txqueuelen"])
            assert sorted(map(str, link.addresses)) == sorted(spec["addresses"])
            assert link.carrier == (spec["processing"]["running"] and spec["up"]) or not spec["up"]


@pytest.mark.parametrize(
    "runs",
    [  # a function's own mark would go before a case's
        pytest.param(3, marks=pytest.mark.timeout(300)),
        pytest.param(WHOLE, marks=[pytest.mark.full, pytest.mark.timeout(1500)]),
    ],
)
def test_the_api_does_what_a_simple_model_says(tmp_path: Path, runs: int) -> None:
    class Here(Machine):
        folder = tmp_path

    given, part = os.environ.get("TUNLEDGER_TEST_SEED"), wanted()
    drawn = given is not None or (runs == WHOLE and part != (1, 1))
    if drawn:
        seed(f"{given} {part}")(Here)
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=share(runs) if runs == WHOLE else runs,
            stateful_step_count=25,
            deadline=None,
            derandomize=not drawn,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )

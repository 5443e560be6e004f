"""The OpenAPI document: it has every route and no other, is valid, and its examples are what it says they are."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from litestar import Litestar
from litestar.routes import HTTPRoute

from service.api.bodies import BATCH_MAX
from service.api.openapi import ELSEWHERE, FILES, PAGE_HEADERS, document, recorded_examples
from service.api.problems import BODY_MAX_BYTES
from service.domain import values
from service.domain.errors import ErrorCode
from tests.api.running import Running

DOCUMENT = document(recorded_examples())
METHODS = ("get", "put", "post", "delete", "patch")


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def routes(app: Litestar) -> set[tuple[str, str]]:
    """What the application answers to, as the document writes it."""
    return {
        (method.lower(), re.sub(r":[a-z]+\}", "}", route.path))
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if method != "OPTIONS"
    }


def closed(schema: Any) -> Any:
    """The same schema, with no members but those it names: an answer must not have more than is documented."""
    match schema:
        case dict():
            found = {key: closed(each) for key, each in schema.items()}
            if "properties" in found and found.get("type") in ("object", ["object", "null"]):
                found.setdefault("additionalProperties", False)
            return found
        case list():
            return [closed(each) for each in schema]
        case _:
            return schema


def judge(schema: Any) -> jsonschema_rs.Draft202012Validator:
    whole = {**closed(schema), "components": closed(DOCUMENT["components"])}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def test_every_route_is_documented_and_nothing_else(api: Running) -> None:
    documented = {(method, path) for method, path, _ in operations()}
    assert routes(api.app._app) == documented  # type: ignore[attr-defined]  # the gate is around it


def test_the_document_is_valid_and_served(api: Running) -> None:
    response = api.call("GET", "/schema/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == DOCUMENT
    assert DOCUMENT["openapi"] == "3.1.0"
    schemathesis.openapi.from_dict(DOCUMENT).validate()  # against the specification's own schema
    for name in DOCUMENT["components"]["schemas"]:
        judge({"$ref": f"#/components/schemas/{name}"})


def test_references_lead_somewhere() -> None:
    ids = {operation["operationId"] for _, _, operation in operations()}
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(DOCUMENT)):
        found: Any = DOCUMENT
        for part in reference.split("/"):
            found = found[part]
    assert set(re.findall(r'"operationId": "([^"]+)"', json.dumps(DOCUMENT))) == ids, "links lead to operations"


def test_operations_are_described() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for method, path, operation in operations():
        assert operation["summary"], (method, path)
        assert set(operation["tags"]) <= tags, (method, path)
        assert {"401", "403", "500"} <= set(operation["responses"]), (method, path)
        assert {"200", "201"} & set(operation["responses"]), (method, path)
        inline = {each["name"] for each in operation.get("parameters", ()) if each.get("in") == "path"}
        shared = {each["$ref"].rpartition("/")[2] for each in operation.get("parameters", ()) if "$ref" in each}
        named = inline | {DOCUMENT["components"]["parameters"][each]["name"] for each in shared}
        assert set(re.findall(r"\{([a-z_]+)\}", path)) <= named, (method, path)


def test_every_error_code_belongs_to_a_call() -> None:
    text = json.dumps(DOCUMENT["paths"])
    assert {code for code in ErrorCode if f"`{code.value}`" not in text} == ELSEWHERE
    assert DOCUMENT["components"]["schemas"]["ErrorCode"]["enum"] == [code.value for code in ErrorCode]


def test_bounds_are_the_ones_enforced() -> None:
    spec = DOCUMENT["components"]["schemas"]["InterfaceSpec"]["properties"]
    assert (spec["mtu"]["minimum"], spec["mtu"]["maximum"]) == (values.MTU_MIN, values.MTU_MAX) == (68, 65535)
    assert spec["name"]["maxLength"] == values.NAME_BYTES_MAX == 15
    assert f"{BODY_MAX_BYTES // 1024} KiB" in DOCUMENT["info"]["description"]
    assert f"{BATCH_MAX} commands" in DOCUMENT["info"]["description"]


@pytest.mark.parametrize("name", ["tun0", "a" * 15, "!", "~", "eth0.1", "A-b_c", "$", "&", "(", ";", "9"])
def test_the_pattern_of_names_takes_what_the_code_takes(name: str) -> None:
    assert judge(DOCUMENT["components"]["schemas"]["SpecRead"]["properties"]["name"]).is_valid(name)
    assert values.parse_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a" * 16, "a b", "a/b", "a:b", "a%b", "all", "default", "é", "a\n"])
def test_the_pattern_of_names_refuses_what_the_code_refuses(name: str) -> None:
    assert not judge(DOCUMENT["components"]["schemas"]["SpecRead"]["properties"]["name"]).is_valid(name)
    with pytest.raises(Exception, match="name"):
        values.parse_name(name)


def test_every_call_has_an_example() -> None:
    without = {operation["operationId"] for _, _, operation in operations()} - set(recorded_examples())
    assert without == {"openapi", "browse", "browserPart"}, "the document itself and its page"


def test_examples_fit_their_schemas() -> None:
    checked = 0
    for method, path, operation in operations():
        contents = [(status, response.get("content", {})) for status, response in operation["responses"].items()]
        contents.append(("request", operation.get("requestBody", {}).get("content", {})))
        for status, content in contents:
            for media_type, media in content.items():
                for name, example in media.get("examples", {}).items():
                    errors = [
                        f"{e.instance_path}: {e.message}" for e in judge(media["schema"]).iter_errors(example["value"])
                    ]
                    assert not errors, (method, path, status, media_type, name, errors[:3])
                    checked += 1
    assert checked >= 60


def test_parameters_and_schemas_fit_their_own_examples() -> None:
    def walk(schema: Any) -> None:
        match schema:
            case dict():
                for example in schema.get("examples", ()) if isinstance(schema.get("examples"), list) else ():
                    assert judge(schema).is_valid(example), (schema, example)
                if "default" in schema and "type" in schema:
                    assert judge(schema).is_valid(schema["default"]), schema
                for each in schema.values():
                    walk(each)
            case list():
                for each in schema:
                    walk(each)
            case _:
                pass

    walk(DOCUMENT["components"])


def test_the_page_needs_nothing_from_elsewhere(api: Running) -> None:
    page = api.call("GET", "/schema")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert api.call("GET", "/schema/").text == page.text
    texts = [page.text]
    for name, media_type in FILES.items():
        part = api.call("GET", f"/schema/{name}")
        assert part.status_code == 200
        assert part.headers["content-type"].split(";")[0] == media_type
        assert part.headers["x-content-type-options"] == "nosniff"
        texts.append(part.text)
    for text in texts:
        assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text.replace("http://www.w3.org/2000/svg", ""))
    for reference in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert api.call("GET", reference).status_code == 200, reference
    assert api.call("GET", "/schema/nothing.js").status_code == 404
    assert "unsafe" not in PAGE_HEADERS["Content-Security-Policy"]
    assert not re.search(r"\bstyle=|\bon[a-z]+=|<script>|<style", page.text), "the policy would refuse it"

"""The token proves ownership, so nothing but exactly a token may read as one."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from service.domain.token import Token, parse_token
from service.domain.values import InterfaceId, NodeId

TEXT = "tunledger:0123456789ab:01890a5d-ac96-774b-bcce-b302099a8057"


def test_token_reads_back_and_fits_an_alias() -> None:
    token = Token(NodeId("0123456789ab"), InterfaceId("01890a5d-ac96-774b-bcce-b302099a8057"))
    assert str(token) == TEXT
    assert parse_token(TEXT) == token
    assert len(TEXT) < 256  # IFALIASZ (linux/if.h)


@pytest.mark.parametrize(
    "alias",
    [
        "",
        "tunledger",
        TEXT.upper(),
        f" {TEXT}",
        f"{TEXT} ",
        f"{TEXT}\n",
        TEXT[:-1],
        f"{TEXT}0",
        TEXT.replace("tunledger", "tunLedger"),
        TEXT.replace(":0123456789ab:", ":0123456789a:"),
        TEXT.replace(":0123456789ab:", "::"),
        TEXT.replace("-", ""),
        TEXT.replace("0", "\u0660"),  # a digit, but of another script
        f"x{TEXT}",
        f"{TEXT}:{TEXT}",
    ],
)
def test_what_is_nearly_a_token_is_none(alias: str) -> None:
    assert parse_token(alias) is None


@given(some.text() | some.from_regex(r"tunledger:[0-9a-g]{11,13}:[0-9a-f-]{35,37}", fullmatch=True))
def test_what_reads_as_a_token_is_exactly_one(alias: str) -> None:
    token = parse_token(alias)
    assert token is None or str(token) == alias

"""Many rows in few statements, each where it belongs."""

import sqlite3

import pytest
import sqlalchemy as sa

from service.store import rows

HEAD = "INSERT INTO numbers (id, text)"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 1000, 1235])
def test_all_rows_are_written_in_their_order_by_few_statements(count: int) -> None:
    wanted = [(number, f"row {number}") for number in range(count)]
    executed: list[str] = []
    with sa.create_engine("sqlite://").connect() as connection:
        connection.exec_driver_sql("CREATE TABLE numbers (place INTEGER PRIMARY KEY, id INTEGER, text TEXT)")
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.set_trace_callback(executed.append)
        rows.insert(connection, HEAD, wanted)
        driver.set_trace_callback(None)
        assert connection.exec_driver_sql("SELECT id, text FROM numbers ORDER BY place").all() == wanted
    assert len([each for each in executed if each.startswith(HEAD)]) <= count // 256 + 8


def test_what_is_to_be_done_with_a_row_that_is_there_holds_for_all() -> None:
    with sa.create_engine("sqlite://").connect() as connection:
        connection.exec_driver_sql("CREATE TABLE numbers (id INTEGER PRIMARY KEY, text TEXT)")
        rows.insert(connection, HEAD, [(2, "old")])
        tail = "ON CONFLICT (id) DO UPDATE SET text = excluded.text"
        rows.insert(connection, HEAD, [(1, "new"), (2, "new"), (3, "new")], tail)
        found = connection.exec_driver_sql("SELECT id, text FROM numbers").all()
    assert found == [(1, "new"), (2, "new"), (3, "new")]

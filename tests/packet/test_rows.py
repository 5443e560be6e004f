"""What is said of all rows at once must be what each row says."""

import struct

from service.packet.rows import Rows


def rows_of(*packets: bytes) -> Rows:
    rows = Rows(memoryview(bytearray(b"\xff" * 4 * 64)), 64, 4)
    for place, packet in zip(rows.places, packets, strict=False):
        place[: len(packet)] = packet
    assert rows.hold(list(map(len, packets)))
    return rows


def test_views_are_kept_while_lengths_repeat_and_no_longer() -> None:
    rows = rows_of(b"ab", b"cdef")
    first = rows.views()
    assert first == [b"ab", b"cdef"]
    assert (rows.least, rows.octets) == (2, 6)
    first.clear()  # the list is the caller's
    assert not rows.hold([2, 4])
    assert rows.views() == [b"ab", b"cdef"]
    for lengths in ([4, 2], [4], [3, 3], [3, 3, 3], [3], [0, 3], [3, 3]):
        assert rows.hold(list(lengths))
        assert list(map(len, rows.views())) == lengths
        assert (rows.least, rows.octets) == (min(lengths), sum(lengths))
        assert rows.words(0) == struct.pack(f"!{len(lengths)}H", *lengths)


def test_only_the_packets_that_are_there_are_held() -> None:
    rows = rows_of(b"abc", b"def", b"ghi")
    three = rows.views()
    assert rows.holds(three)
    rows.hold([3, 3])
    two = rows.views()
    assert rows.holds(two)
    assert rows.holds(three[:2]), "views of one length are kept"
    assert not rows.holds(three), "and of no more packets than there are"
    rows.hold([2, 3])
    rows.views()
    assert not rows.holds(two)


def test_views_of_any_number_of_lengths_are_right() -> None:
    rows = Rows(memoryview(bytearray(range(128))), 64, 2)
    for length in (*range(40), *range(40)):
        for count in (1, 2, 1):
            rows.hold([length] * count)
            assert rows.views() == [bytes(range(start, start + length)) for start in (0, 64)[:count]]
    assert len(rows._uniform) <= 16, "a sender of many lengths fills no memory"


def test_views_of_other_lengths_are_forgotten_too() -> None:
    rows = rows_of(b"abc")
    rows.views()[0].release()
    rows.hold([2])
    rows.views()
    rows.forget()
    rows.hold([3])
    assert rows.views() == [b"abc"]


def test_released_views_are_made_anew_once_they_are_forgotten() -> None:
    rows = rows_of(b"ab")
    rows.views()[0].release()
    rows.forget()
    assert not rows.hold([2]), "how long they are is known still"
    assert rows.views() == [b"ab"]


def test_a_length_that_fits_no_word_is_none() -> None:
    rows = Rows(memoryview(bytearray(2 * 70_000)), 70_000, 2)
    rows.hold([20, 65_600])
    assert (rows.words(0), rows.words(21), rows.words(65)) == (None, None, None)
    rows.hold([65, 65_600])
    assert rows.words(65) == b"\0\0\xff\xff"


def test_columns_and_fields_are_of_every_row() -> None:
    rows = rows_of(b"abcdef", b"ghijkl", b"mnopqr")
    assert rows.column(1, 1).tobytes() == b"bhn\xff"
    assert rows.column(2, 2).tobytes() == b"cdijop\xff\xff"
    assert rows.column(3, 2).tobytes() == b"dejkpq\xff\xff"
    assert rows.fields("x2sH") == (b"bc", 0x6465, b"hi", 0x6A6B, b"no", 0x7071)

"""Tests of the room `service/packet`."""

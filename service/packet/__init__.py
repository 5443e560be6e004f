"""Packets as values: what the octets off a TUN or TAP say, and nothing about what to do with them.

Pure: octets in, values out. No I/O, no clock, no logging, and no import from any other room.
"""

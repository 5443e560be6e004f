"""The rules of tunledger, pure: no clock, no randomness, no I/O, and nothing imported from our other rooms."""

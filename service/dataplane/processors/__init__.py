"""The processors that come with tunledger, one module each, written against `service.dataplane.contract`.

inspect.py   counts: totals, flows, the latest packets
filter.py    passes or drops by rules
reply.py     answers echo requests, ARP and neighbour solicitations
forward.py   sends to another interface
balance.py   spreads flows over several interfaces
"""

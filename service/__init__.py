"""tunledger: TUN/TAP interfaces on Linux over REST, every command in an event log first.

Only the version lives here; `service.app` is the composition root.
"""

__version__ = "0.1.0"

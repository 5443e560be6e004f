"""The HTTP side put together: the application behind uvicorn, on sockets of ours.

`service.app` imports this module when start-up has done its work: importing litestar takes longer than bringing back
what a crash left. Nothing that start-up needs may live here.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import uvicorn

from service.api.application import application
from service.api.bodies import Defaults
from service.api.connection import Connection
from service.api.events import EventLog
from service.api.orders import Orders
from service.api.read import LogView
from service.api.traffic import Traffic
from service.kernel.peer import Asker
from service.reconcile.answer import Clock
from service.reconcile.captures import Captures
from service.reconcile.engine import Engine
from service.reconcile.feed import Feed
from service.store.counters import CounterReader
from service.store.reader import LogReader
from service.store.snapshots import Progress


class Server(uvicorn.Server):
    """uvicorn on sockets of ours, with the signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signals over."""
        yield


def server(
    engine: Engine,
    clock: Clock,
    defaults: Defaults,
    reader: LogReader,
    feed: Feed,
    counters: CounterReader,
    asker: Asker,
    *,
    captures: Captures,
    traffic: Traffic,
    audit: Callable[[], Progress] | None,
    shutdown_s: float,
) -> Server:
    """What answers HTTP, not yet begun.

    Args:
        audit: how far the log has been checked in the background; None where nothing checks it.
        shutdown_s: how long requests under way are waited for at the end.
    """
    app = application(
        Orders(engine, clock, defaults),
        LogView(reader),
        EventLog(reader, feed),
        counters,
        captures=captures,
        traffic=traffic,
        owner_of=asker.owner,
        own_uid=os.geteuid(),
        audit=audit,
    )
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, int(shutdown_s)),
    )
    config.load()
    return Server(config)

"""Worker processes that read packets off TUN and TAP devices, and the supervisor that keeps them running.

Packets never pass through the API's process: this room gets open file descriptors and gives back counters.
It knows `packet` and nothing else of ours. Which interface should be processed is decided elsewhere.

    supervisor.py      what the service talks to: attach, detach, counters; replaces dead workers
    worker_process.py  one worker as its parent sees it: spawn, ask, kill, reap
    line_reader.py     the supervisor's end of the packet lines
    layout.py          the counters' shared memory, both ends
    wire.py            the messages on the sockets, both ends
    worker.py          the program that a worker runs
    packet_lines.py    the worker's end of the packet lines
    contract.py        what a processor is
    processors/        those that come with tunledger
    flowtable.py       what inspect found, in shared memory, both ends
    fake.py            to try processors with, without a worker
"""

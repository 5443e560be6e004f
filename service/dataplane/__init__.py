"""Worker processes that read packets off TUN and TAP devices, and the supervisor that keeps them running.

Packets never pass through the API's process: this room gets open file descriptors and gives back counters.
It knows `packet` and nothing else of ours. Which interface should be processed is decided elsewhere.

    supervisor.py      what the service talks to: attach, configure, detach, taps, counters; replaces dead workers
    attachment.py      a device and the worker that has it, as the supervisor keeps it
    placement.py       which devices have to be with the same worker
    provisions.py      what a stage takes along: memory, files
    crashes.py         what becomes of a stage that took its worker down
    worker_process.py  one worker as its parent sees it: spawn, ask, kill, reap
    line_reader.py     the supervisor's end of the packet lines
    layout.py          the counters' shared memory, both ends
    blackbox.py        the packets' memory, which survives the worker, both ends
    wire.py, work.py   the messages on the sockets, and what is to be done with packets, both ends
    worker.py          the program that a worker runs: its loop, and what it is asked
    device.py          one device in it: packets in and out, counted, through the chain
    device_batch.py    a batch as a device makes it
    segments.py        segments cut, checksums finished, for those who take none
    stages.py          the stages of one device: made, kept, run, closed
    registry.py        which processors there are
    confinement.py     what a worker gives up; syscalls.py: the calls that are left to it
    packet_lines.py    the worker's end of the packet lines
    contract.py        what a processor is
    processors/        those that come with tunledger
    flowtable.py       what inspect found, in shared memory, both ends
    fake.py            to try processors with, without a worker
"""

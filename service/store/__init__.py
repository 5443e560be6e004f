"""The event log and the counters in SQLite. Rows and connections stay in this room; events and values leave it."""

"""The rules of tunledger, by tables, cases and properties; no kernel but the fake one."""

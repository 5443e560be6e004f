"""The `tunledger` command. Talks HTTP to the service, but for serve, migrate, verify, doctor and config."""

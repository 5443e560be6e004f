"""Faults on purpose, and an oracle outside the service that says what must hold after each of them."""

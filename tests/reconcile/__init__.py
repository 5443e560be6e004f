"""The engine on a fake kernel and a real log."""

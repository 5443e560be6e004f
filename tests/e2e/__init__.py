"""The real service process, the real kernel, real packets."""

"""The OpenAPI document, held against the real service."""

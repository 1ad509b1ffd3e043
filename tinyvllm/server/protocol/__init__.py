"""The wire format: what the routes read and write, as pydantic models. A file a concern."""

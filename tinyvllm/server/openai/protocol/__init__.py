"""The wire format: what the routes read and write, as pydantic models. One file per concern."""

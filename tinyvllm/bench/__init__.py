"""Measurements from outside: steps alone, and the engine under load. Rows of figures, as tables and as JSON."""

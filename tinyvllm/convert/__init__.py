"""Writes models in other formats, a few rows at a time, with NumPy alone.

`quantize.quantize` is the door. A target (`targets`) has an output (`gguf_output`, `hf_output`): pieces, which say what
each tensor becomes, and a header that gives every array its place; `stream` fills the places. `destination` says what
an output may replace, and gives it its name when it is complete.
"""

"""How weights lie in a device's memory, and how kernels read their values back."""

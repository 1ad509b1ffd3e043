"""The CPU device's backend and its kernels."""

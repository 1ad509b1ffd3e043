"""The building blocks of kernels: axes and registers, lanes and matrix units, tiles, and tuned choices."""

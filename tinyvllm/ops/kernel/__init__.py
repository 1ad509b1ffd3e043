"""What kernels are written in: axes and registers, lanes and matrix units, tiles, and the choice of a tuned kernel."""

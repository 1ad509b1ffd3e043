"""The backends of devices with threadgroups (METAL, CUDA, OpenCL) and their kernels."""

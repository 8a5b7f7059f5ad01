"""The Triton path: NSA on CUDA devices, behind the functions of `nsa_kernels.ops`."""

"""The `triton` backend: GPU kernels, compiled on the user's machine by the Triton that PyTorch brings. docs/kernels.md

Only `backend.py` and `ops.py` are imported with `fastmoe`; what imports Triton is imported when it is first needed.
"""

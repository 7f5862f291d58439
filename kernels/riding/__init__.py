"""Triton kernels of the riding form, whose adapter changes the layer's input: csrc/riding/riding.h has the notation.

    change, change_back     jit functions only
    launch                  one function per kernel: arguments, grid, configuration
    operator                ``ride`` and ``ride_back`` as in operator/backends/eager.py

Tile sizes and plans are those of the parent package.
"""

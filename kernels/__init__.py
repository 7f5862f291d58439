"""Triton kernels of the operator: the adapter's products tiled over whole frequency groups.

    blocks, project, expand, fused, core_gradient     jit functions only
    configs                                           frozen tables of tile sizes, one per GPU and a fallback
    launch                                            one function per kernel: arguments, grid, configuration
    middle                                            the core for the kernels: float32, phases, tilings
    plans, prepared                                   launches that are planned once per layout of their tensors
    operator                                          forward and backward as in operator/backends/eager.py
    riding                                            the riding form's kernels, launches and operator

Importing this package does not import Triton; importing ``tcurlora_ext.kernels.operator`` does.

Layout. The S blocks of h, m, p, dh, each r (or c) columns wide, form *groups*. For the DFT a group is a single block
(0, and S-1 for even S) or a pair of blocks that the phase couples: (1, 2), (3, 4), ... For the DCT every block is a
group. Tiles hold whole groups and are counted in *virtual* columns, in which all groups are equally wide. For the DFT,
v = column + r: one block of padding before the first block (and one after the last for even S) makes every group two
blocks wide, and group g takes v in [2 g r, 2 (g+1) r). For the DCT, v = column. The padding is never in memory: a tile
is loaded from a multiple of 8 columns at or before its first column, and columns of other tiles are masked.
"""

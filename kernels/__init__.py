"""Triton kernels of the operator: the adapter's products tiled over whole frequency groups.

    blocks, project, expand, fused, core_gradient     jit functions only
    configs                                           frozen tables of tile sizes, one per GPU and a fallback
    launch                                            one function a kernel: arguments, grid, configuration
    operator                                          forward and backward with the contract of operator/eager.py
    wide                                              blocks too wide for one tile, in batched products

Importing this package does not import Triton; ``tcurlora_ext.kernels.operator`` does.

Layout. The S blocks of h, m, p, dh, each r (or c) columns wide, form *groups* that the phase couples: for the DFT block
0 alone, (1, 2), (3, 4), ..., and block S-1 alone for even S; for the DCT every block is a group. A pair is two blocks
wide, a block alone one, so tiles of whole groups are counted in *virtual* columns v = column + r: a block of padding in
front (and one behind for even S) makes every group two blocks wide, group g at v in [2 g r, 2 (g+1) r). For the DCT
nothing is padded, v = column. Memory never holds the padding: a tile is fetched from a multiple of 8 columns at or
before its first, and columns that are not its own are masked.
"""

"""One call of a layer for a batch of many adapters: the tokens of each adapter with that adapter's core.

All adapters share rows, columns, C and R, so h = x R^T and the products as wide as the layer are computed for all
tokens together, as for one adapter. Between them, every token is multiplied by the core of its own adapter: by one
batched product over blocks of tokens that have one adapter (:mod:`.plan`, :mod:`.mixing`). :mod:`.forms` puts that
into both forms of an adapted layer. All of it is PyTorch operations, on any device.
"""

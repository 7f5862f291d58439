"""One call of a layer for a batch of many adapters: the tokens of each adapter with that adapter's core.

All adapters share rows, columns, C and R, so h = x R^T and the products as wide as the layer are computed for all
tokens together, as for one adapter. Between them, every token is multiplied by the core of its own adapter: by one
batched product over blocks of tokens that have one adapter (:mod:`.plan`, :mod:`.mixing`). Both forms of an adapted
layer have it, each as a function of autograd: :mod:`.ordinary` and :mod:`.riding`. All of it is PyTorch operations, on
any device. Sums are at least float32. A module of which every adapter has its own, such as a head, is in
:mod:`.beside`.
"""

from .beside import beside
from .ordinary import ordinary
from .plan import TokenPlan
from .riding import riding

__all__ = ["TokenPlan", "beside", "ordinary", "riding"]

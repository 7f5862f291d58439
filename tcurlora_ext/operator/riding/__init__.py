"""The adapter that rides on the base product: operators that change a layer's input in place of adding to its output.

``riding``          x, weight, bias, adapter -> y; what a layer calls. Over ``riding_forward`` -> (y, h) and
                    ``riding_backward`` -> (dx, dbias, dcore, drow).
``ride``            x, adapter -> x', the changed input of any frozen base (quantised, sharded). Over ``ride_forward``
                    -> (x', h) and ``ride_backward`` -> (dx, dcore, drow).

The forward operators keep h (T x r) for the backward ones, and x only where R trains. An empty tensor stands for each
gradient that ``needs`` does not ask for. A backend has the two steps that differ between backends, ``ride`` and
``ride_back`` (:mod:`tcurlora_ext.operator.backends.base`); the base's products are the library's for all of them.
"""

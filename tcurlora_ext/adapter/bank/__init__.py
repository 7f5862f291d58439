"""Many adapters of one base in one batch: :class:`tcurlora_ext.AdapterBank`."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]

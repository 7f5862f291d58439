"""The command ``tcurlora``. Its modules import torch inside functions only, so that ``--help`` is quick."""

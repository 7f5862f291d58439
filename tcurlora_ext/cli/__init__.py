"""The command ``tcurlora``. Its modules import torch only inside the functions, so that ``--help`` does not wait."""

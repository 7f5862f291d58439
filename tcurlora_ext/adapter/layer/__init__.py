"""The layers that use a stack: drop-in forms of ``nn.Linear`` and of transformers' ``Conv1D``."""

"""The adapter in other libraries: one package per library, which imports that library."""

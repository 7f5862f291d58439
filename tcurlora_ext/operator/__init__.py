"""How the adapter is computed: the registered operators, their backends and the functional form."""

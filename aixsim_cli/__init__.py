"""Transform-aware training of language models: the `aixsim` command and the library under it."""

__version__ = "0.1.0"

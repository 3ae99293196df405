"""The one factory of tiny models, layers and tokenizers, and how results are compared (see ``tests/README.md``)."""

"""Models of six kinds that train with ``KFAC(model)`` and nothing else: ``python -m examples.models [name…]``."""

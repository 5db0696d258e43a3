"""K-FAC beside SGD, AdaGrad and Adam, with a table and pictures: ``python -m examples.demo``."""

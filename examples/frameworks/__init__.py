"""K-FAC inside the training loops of others. Each file is one complete program; tests/test_frameworks.py runs them."""

"""What the README claims, measured: each module runs alone with `python -m benchmarks.<name>`."""

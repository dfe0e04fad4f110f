"""Random calls of the public functions, valid and invalid: ``python -m random_calls`` makes them."""

"""Federated rounds between machines, carried by Flower. Only this package imports `flwr`."""

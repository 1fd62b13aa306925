"""The load of the experts of routed adapters, on held-out texts."""

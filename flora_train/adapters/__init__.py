"""Where do the adapters live, and how does a frozen layer use them? The bank, its routing and the wrapped layers."""

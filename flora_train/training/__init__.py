"""How do all adapters of a batch learn at once, each as if alone? The loop and its parts."""

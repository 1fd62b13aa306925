"""Train many task-specific adapters at once on one frozen base model, each as good as if trained alone."""

__version__ = "0.1.0"

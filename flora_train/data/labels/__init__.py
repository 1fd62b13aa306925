"""Labels: classes, several labels, numbers and tags that the adapters of a task learn from texts."""

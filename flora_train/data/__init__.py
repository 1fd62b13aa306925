"""What does each step train on? Rows from sources, tokenised once, mixed over tasks, grouped into batches."""

"""What does the user ask for? YAML and `key=value` words in, one validated, frozen object out."""

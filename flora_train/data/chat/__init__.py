"""Tasks of conversations: reading, rendering and tokenizing them, with the assistant's turns learnt."""

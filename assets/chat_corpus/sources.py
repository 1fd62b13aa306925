"""Which languages and topics of chatterbot-corpus are used."""

from __future__ import annotations

VERSION = "1.3.3"
LANGUAGES = ("dutch", "english", "italian", "japanese", "korean", "portuguese", "spanish", "ukrainian")
"""Languages with at least 280 entries whose answers fit their questions. Chinese is a rough machine
translation, most entries of Persian are alternatives, and other languages have too few."""

LEFT_OUT = ("coding", "gossip", "humor", "politics", "psicologia", "psychology", "tech_support", "unilab")
"""Topics: insults, opinions about people and parties, and long technical texts that English alone has."""

DIALOGUES = ("conversations", "greetings", "health")
"""Topics whose entries are turns of two speakers; others have a question and alternative answers."""
